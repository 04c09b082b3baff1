"""Counters of a party's federation layer as Prometheus text (exposition format 0.0.4)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields

from fate_llm.protocols.link import LinkCounters, SecureLink
from fate_llm.protocols.transports.rabbitmq import RabbitTransport, TransportCounters

__all__ = ["prometheus_text"]

_HELP = {
    "messages_sent": "Messages sent to the peer.",
    "messages_received": "Messages received from the peer.",
    "bytes_sent": "Bytes of messages sent to the peer, before sealing.",
    "bytes_received": "Bytes of messages received from the peer.",
    "chunks_sent_again": "Chunks sent a second time because the peer lacked them.",
    "duplicates": "Frames of the peer that came twice.",
    "early": "Chunks of the peer that came before their turn.",
    "refused": "Frames in the peer's name that were refused.",
    "published": "Frames published to the broker.",
    "confirmed": "Frames that the broker has confirmed.",
    "returned": "Frames that no inbox was there for yet.",
    "delivered": "Frames delivered by the broker.",
    "redelivered": "Frames delivered by the broker more than once.",
    "reconnects": "Connections to the broker after the first.",
    "blocked": "Times that the broker blocked publishing.",
}


def prometheus_text(party: str, transport: RabbitTransport, link: SecureLink) -> str:
    """All counters of one party, by peer where there is one, and the round trip to each peer in seconds."""
    lines: list[str] = []
    for field in fields(LinkCounters):
        values = {peer: getattr(counters, field.name) for peer, counters in link.counters.items()}
        samples = ((f'{{party="{party}",peer="{peer}"}}', value) for peer, value in values.items())
        lines += _family(f"fate_llm_link_{field.name}_total", "counter", _HELP[field.name], samples)
    for field in fields(TransportCounters):
        sample = (f'{{party="{party}"}}', getattr(transport.counters, field.name))
        lines += _family(f"fate_llm_broker_{field.name}_total", "counter", _HELP[field.name], [sample])
    gauges: list[tuple[str, str, Mapping[str, float]]] = [
        ("unreported_bytes", "Bytes on the way to the peer that it has not reported yet.", link.unreported()),
        ("round_trip_seconds", "Seconds from the last probe to its answer.", link.round_trips()),
    ]
    for name, text, found in gauges:
        samples = ((f'{{party="{party}",peer="{peer}"}}', value) for peer, value in found.items())
        lines += _family(f"fate_llm_link_{name}", "gauge", text, samples)
    return "\n".join(lines) + "\n"


def _family(name: str, kind: str, text: str, samples: Iterable[tuple[str, float]]) -> list[str]:
    return [
        f"# HELP {name} {text}",
        f"# TYPE {name} {kind}",
        *(f"{name}{labels} {value:g}" for labels, value in samples),
    ]
