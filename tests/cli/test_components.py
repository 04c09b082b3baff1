"""`components list` and `describe`: from the classes, without torch."""

from __future__ import annotations

import pytest

from fate_llm.core import plugins
from fate_llm.runtime.describe import describe_component
from tests.cli.conftest import Run, document, only_error, python


def test_the_list_has_every_component_with_a_sentence(run: Run) -> None:
    found = document(run("components", "list", "--json"))
    assert [one["name"] for one in found] == plugins.names("component")
    assert all(len(one["summary"]) > 20 for one in found)
    lines = run("components", "list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == plugins.names("component")


@pytest.mark.parametrize("name", plugins.names("component"))
def test_a_description_is_that_of_the_class(name: str, run: Run) -> None:
    assert document(run("components", "describe", name, "--json")) == describe_component(name)


@pytest.mark.parametrize("name", plugins.names("component"))
def test_people_see_every_port_and_setting(name: str, run: Run) -> None:
    text = run("components", "describe", name).stdout
    found = describe_component(name)
    assert text.startswith(name)
    assert f"roles: {', '.join(found['roles'])}" in text
    for port in (*found["inputs"], *found["outputs"]):
        assert f"  {port['name']} ({port['kind']}" in text
    for setting in found["params"]:
        assert f"  {setting['name']}: {setting['type']}" in text


def test_an_unknown_name_has_the_nearest(run: Run) -> None:
    error = only_error(run("components", "describe", "spliter", "--json", exit_code=2))
    assert (error["code"], error["hint"]) == ("unknown_plugin", "did you mean 'splitter'?")
    done = run("components", "describe", "spliter", exit_code=2)
    assert "error [unknown_plugin]: no component is called 'spliter'" in done.stderr
    assert "hint: did you mean 'splitter'?" in done.stderr


def test_no_path_is_imported(run: Run) -> None:
    assert only_error(run("components", "describe", "os.path", "--json", exit_code=2))["code"] == "unknown_plugin"


def test_neither_loads_torch() -> None:
    script = (
        "import sys\n"
        "from fate_llm.cli.main import main\n"
        "main(['components', 'list'], standalone_mode=False)\n"
        "main(['components', 'describe', 'homo_llm_trainer'], standalone_mode=False)\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    done = python("-c", script)
    assert done.returncode == 0, done.stderr
