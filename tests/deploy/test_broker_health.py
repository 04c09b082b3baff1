"""The broker's health check, word for word as compose runs it, against a real broker."""

from __future__ import annotations

import pytest

from fate_llm.core.errors import ConfigurationError
from fate_llm.runtime.broker import BrokerNode, find_server, free_port, run_ctl
from tests.brokers import broker  # noqa: F401

from .program import ROOT
from .test_compose import services


def checks() -> list[list[str]]:
    return [service["healthcheck"]["test"] for _, name, service in services(ROOT) if name == "broker"]


def test_it_tells_a_port_that_is_listened_on_from_one_that_is_not(broker: BrokerNode) -> None:  # noqa: F811
    found = checks()
    assert len(found) == 2
    for kind, tool, *words, port in found:
        assert (kind, port) == ("CMD", "5671")
        command = [str(find_server() / tool)]
        run_ctl(command, [*words, str(broker.port)], env=broker._environment())
        with pytest.raises(ConfigurationError, match="failed"):
            run_ctl(command, [*words, str(free_port())], env=broker._environment())
