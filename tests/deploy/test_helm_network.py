"""Who may talk to whom: the chart's NetworkPolicies, worked out as Kubernetes does."""

from collections.abc import Iterator
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from tests.deploy.chart import CASES, Object, component, name, of_kind, pods, rendered, selects

every_case = pytest.mark.parametrize("case", CASES)
PORTS = {"api": 8000, "reaper": 9464, "postgresql": 5432, "valkey": 6379, "generator": 8001}


@every_case
def test_every_pod_of_the_release_is_closed_unless_a_policy_opens_it(case: str) -> None:
    parts = rendered(case)
    for whose, pod in pods(parts):
        closed = set()
        for policy in of_kind(parts, "NetworkPolicy"):
            if selects(policy["spec"]["podSelector"], pod["metadata"]["labels"]):
                closed |= set(policy["spec"]["policyTypes"])
        assert closed == {"Ingress", "Egress"}, whose


@every_case
def test_every_policy_is_about_pods_and_ports_that_are_there(case: str) -> None:
    parts = rendered(case)
    for policy in of_kind(parts, "NetworkPolicy"):
        about = [pod for _, pod in pods(parts) if selects(policy["spec"]["podSelector"], pod["metadata"]["labels"])]
        assert about, name(policy)
        for rule in policy["spec"].get("ingress", []):
            for port in rule["ports"]:
                names = {p["name"] for pod in about for c in pod["spec"]["containers"] for p in c["ports"]}
                assert port["port"] in names, name(policy)
            for peer in rule.get("from", []):
                assert peer, f"{name(policy)}: an empty peer is everybody"


def test_in_a_release_with_everything_only_these_connections_are_possible() -> None:
    parts = rendered("everything")
    labels = {component(pod["metadata"]["labels"]): pod for _, pod in pods(parts)}
    open_to = {
        (one, other)
        for one in labels
        for other, port in PORTS.items()
        if other in labels
        if leaves(parts, labels[one], labels[other], port) and enters(parts, labels[one], labels[other], port)
    }
    clients = {"api", "reaper", "worker"}
    # Workers may reach anything there, but none of the others lets them in.
    assert open_to == {(one, "postgresql") for one in clients} | {(one, "valkey") for one in clients}


def test_the_generator_is_asked_by_the_api_alone_and_asks_nobody_of_the_release() -> None:
    parts = rendered("external")
    labels = {component(pod["metadata"]["labels"]): pod for _, pod in pods(parts)}
    open_to = {
        (one, other)
        for one in labels
        for other in labels
        if one != other and "generator" in (one, other) and other in PORTS
        if leaves(parts, labels[one], labels[other], PORTS[other])
        and enters(parts, labels[one], labels[other], PORTS[other])
    }
    assert open_to == {("api", "generator")}


def test_migrations_reach_a_database_elsewhere_and_no_broker() -> None:
    parts = rendered("external")
    [pod] = [pod for whose, pod in pods(parts) if whose.startswith("Job/")]
    ports = {p["port"] for rule in rules(parts, pod, "egress") for p in rule["ports"]}
    assert ports == {53, 5432}


def test_workers_reach_nothing_else_unless_a_value_says_so() -> None:
    for case, more in {"keda": set(), "external": {443}}.items():
        for _, pod in pods(rendered(case)):
            if component(pod["metadata"]["labels"]) == "worker":
                ports = {p["port"] for rule in rules(rendered(case), pod, "egress") for p in rule["ports"]}
                assert ports - {6379, 6380} == {53, 5432} | more


def test_the_reaper_reaches_public_addresses_where_users_may_have_webhooks_and_none_of_the_cluster() -> None:
    for case, may in {"everything": True, "external": False}.items():
        parts = rendered(case)
        [pod] = [pod for _, pod in pods(parts) if component(pod["metadata"]["labels"]) == "reaper"]
        blocks = [
            peer["ipBlock"] for rule in rules(parts, pod, "egress") for peer in rule.get("to", []) if "ipBlock" in peer
        ]
        for address in ("8.8.8.8", "2606:4700::1111"):
            assert _in_one_of(blocks, address) == may
        for address in ("10.1.2.3", "172.20.0.1", "192.168.0.1", "169.254.169.254", "100.64.0.1", "fd00::1", "::1"):
            assert not _in_one_of(blocks, address), address


def test_metrics_are_for_prometheus_and_the_database_for_keda_and_backups() -> None:
    parts = rendered("everything")
    found = {
        component(pod["metadata"]["labels"]): _namespaces(parts, pod)
        for _, pod in pods(parts)
        if component(pod["metadata"]["labels"]) in PORTS
    }
    assert found == {
        "api": {"ingress", "monitoring"},
        "reaper": {"monitoring"},
        "postgresql": {"keda", "backup"},
        "valkey": set(),
    }


def test_the_api_is_open_to_all_unless_a_value_says_otherwise() -> None:
    [pod] = [pod for whose, pod in pods(rendered("keda")) if whose.endswith("-api")]
    assert [rule.get("from") for rule in rules(rendered("keda"), pod, "ingress")] == [None]


def rules(parts: list[Object], pod: Object, way: str) -> Iterator[dict[str, Any]]:
    """Those that open a pod, "ingress" or "egress"."""
    for policy in of_kind(parts, "NetworkPolicy"):
        if selects(policy["spec"]["podSelector"], pod["metadata"]["labels"]):
            yield from policy["spec"].get(way, [])


def leaves(parts: list[Object], one: Object, other: Object, port: int) -> bool:
    return any(_allows(rule, "to", other, {port}) for rule in rules(parts, one, "egress"))


def enters(parts: list[Object], one: Object, other: Object, port: int) -> bool:
    names = {p["name"] for c in other["spec"]["containers"] for p in c["ports"] if p["containerPort"] == port}
    return any(_allows(rule, "from", one, names | {port}) for rule in rules(parts, other, "ingress"))


def _allows(rule: dict[str, Any], peers: str, pod: Object, ports: set[Any]) -> bool:
    port = "ports" not in rule or any(given["port"] in ports for given in rule["ports"])
    inside = [peer["podSelector"] for peer in rule.get(peers, []) if peer.keys() == {"podSelector"}]
    return port and (peers not in rule or any(selects(peer, pod["metadata"]["labels"]) for peer in inside))


def _in_one_of(blocks: list[dict[str, Any]], address: str) -> bool:
    found = ip_address(address)
    return any(
        found in ip_network(block["cidr"]) and not any(found in ip_network(left) for left in block.get("except", []))
        for block in blocks
    )


def _namespaces(parts: list[Object], pod: Object) -> set[str]:
    found = set()
    for rule in rules(parts, pod, "ingress"):
        for peer in rule["from"]:
            if "namespaceSelector" in peer:
                [value] = peer["namespaceSelector"]["matchLabels"].values()
                found.add(value)
    return found
