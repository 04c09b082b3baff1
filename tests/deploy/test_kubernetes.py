"""The manifests: against the schemas of several versions, the restricted pod standard, the program, and kubectl."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from fate_llm.runtime.federation import BrokerPlace, PartySettings
from fate_llm.runtime.federation_broker import BrokerLimits, rabbitmq_conf
from fate_llm.runtime.federation_setup import plan_setup, set_up
from fate_llm.runtime.service.api import create_app

from .kustomize import containers, normal, render
from .program import HOME, ROOT, command_fault, demo_module, library, needs_service, variables_read

FOLDER = "deploy/kubernetes/party"
BROKER = "deploy/kubernetes/broker/rabbitmq.yaml"
BASE, EXAMPLE = f"{FOLDER}/base", f"{FOLDER}/example"
VERSIONS = ("1.29", "1.37")
UID = 10001


def one(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = (item for item in objects if item["kind"] == kind)
    return found


def pod(objects: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = one(objects, "StatefulSet")["spec"]["template"]["spec"]
    return found


@cache
def home_files() -> dict[str, bytes]:
    """What `federation init` writes for a party."""
    setup = plan_setup(name="x", parties=["a", "b"], topology="shared", brokers=["mq.example"])
    files = set_up(setup, now=datetime.now(UTC))
    return {name.removeprefix("parties/a/"): text for name, text in files.items() if name.startswith("parties/a/")}


# --- Checks: each says what is wrong --------------------------------------------------------------------------------


def wrong_standard(root: Path) -> Iterator[str]:
    """Kubernetes' pod security standard `restricted`, and what we ask for beyond it."""
    for folder in (BASE, EXAMPLE):
        objects = render(root / folder)
        found = pod(objects)
        context = found["securityContext"]
        if not context.get("runAsNonRoot") or context.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{folder}: root, or system calls without a profile"
        if {context.get(key) for key in ("runAsUser", "runAsGroup", "fsGroup")} != {UID}:
            yield f"{folder}: not the user of the image"
        if found.get("automountServiceAccountToken") is not False or found.get("enableServiceLinks") is not False:
            yield f"{folder}: the pod is told of the cluster"
        if any(found.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")):
            yield f"{folder}: the pod shares the host's"
        for volume in found["volumes"]:
            if not volume.keys() & {"projected", "emptyDir", "persistentVolumeClaim"}:
                yield f"{folder}: the volume {volume['name']} is of a kind that is not allowed"
        for container in containers(objects):
            rights = container["securityContext"]
            if rights.get("allowPrivilegeEscalation") is not False or rights.get("capabilities") != {"drop": ["ALL"]}:
                yield f"{folder}: {container['name']} keeps rights"
            if rights.get("readOnlyRootFilesystem") is not True:
                yield f"{folder}: {container['name']} can write to its root"
            if "memory" not in container["resources"]["limits"]:
                yield f"{folder}: {container['name']} may take all memory"


def wrong_program(root: Path) -> Iterator[str]:
    """Commands, variables, ports and paths."""
    objects = render(root / BASE)
    (container,) = pod(objects)["containers"]
    if fault := command_fault(container["args"]):
        yield fault
    if container["args"][-2:] != ["--home", HOME] or container["env"] != [{"name": "FATE_LLM_HOME", "value": HOME}]:
        yield f"the home is not {HOME}"
    if not {entry["name"] for entry in container["env"]} <= variables_read():
        yield "a variable that nobody reads"
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    state = f"{HOME}/{PartySettings.model_fields['state'].default}"
    if not mounts.get(HOME, {}).get("readOnly") or mounts.get(state, {"readOnly": True}).get("readOnly"):
        yield "the home is not read-only with a state that is not"
    if "/tmp" not in mounts:
        yield "no place for temporary files"
    if pod(objects)["terminationGracePeriodSeconds"] < 10:
        yield "it is killed before it can end"
    if container["readinessProbe"]["httpGet"]["path"] not in paths():
        yield f"the API has no {container['readinessProbe']['httpGet']['path']}"
    if "httpGet" in container["livenessProbe"] or "httpGet" in container["startupProbe"]:
        yield "it is started anew because its broker is away"
    (made,) = pod(objects)["initContainers"]
    (volume,) = made["volumeMounts"]
    if f"{volume['mountPath']}/{mounts.get(state, {}).get('subPath')}'" not in made["command"][-1]:
        yield "the folder of the state is not the one that is made for it"


@cache
def paths() -> set[str]:
    class Nothing:
        pass

    return set(create_app(Nothing(), "token").openapi()["paths"])  # type: ignore[arg-type]


def wrong_network(root: Path) -> Iterator[str]:
    """One port in, from the namespace; names and brokers out; and all speak of the same port and pods."""
    objects = render(root / BASE)
    api, tls = demo_module("prepare").API_PORT, BrokerPlace.model_fields["port"].default
    (container,) = pod(objects)["containers"]
    (listening,) = container["ports"]
    (port,) = one(objects, "Service")["spec"]["ports"]
    policy = one(objects, "NetworkPolicy")["spec"]
    ((inside,),) = (rule["ports"] for rule in policy["ingress"])
    if {listening["containerPort"], port["port"], inside["port"]} != {api} or port["targetPort"] != listening["name"]:
        yield f"the API is not on {api} everywhere"
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        (how,) = (value for key, value in container[probe].items() if key in ("tcpSocket", "httpGet"))
        if how["port"] != listening["name"]:
            yield f"the {probe} asks another port"
    if [rule.get("from") for rule in policy["ingress"]] != [[{"podSelector": {}}]]:
        yield "others than this namespace reach the API"
    out = {port["port"] for rule in policy["egress"] for port in rule["ports"]}
    if out != {53, tls} or set(policy["policyTypes"]) != {"Ingress", "Egress"}:
        yield f"out go {sorted(out)}"
    if any("ports" not in rule for rule in policy["egress"]):
        yield "everything may go out"
    labels = one(objects, "StatefulSet")["spec"]["template"]["metadata"]["labels"]
    selectors = [
        one(objects, "Service")["spec"]["selector"],
        policy["podSelector"]["matchLabels"],
        one(objects, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        one(objects, "StatefulSet")["spec"]["selector"]["matchLabels"],
    ]
    if any(not selector.items() <= labels.items() for selector in selectors):
        yield "something speaks of other pods"
    if one(objects, "StatefulSet")["spec"]["replicas"] != 1:
        yield "there is not one of the party"


def wrong_files(root: Path) -> Iterator[str]:
    """What is mounted as the home is what `federation init` writes; secrets are in the Secret, nothing else is."""
    files = home_files()
    settings = yaml.safe_load(files["party.yaml"])
    named = {settings["identity"], settings["sealing"], settings["password"], settings["key"], settings["api"]["token"]}
    objects = render(root / EXAMPLE)
    secret, plain = set(one(objects, "Secret")["data"]), set(one(objects, "ConfigMap")["data"])
    if secret != named:
        yield f"in the Secret are {sorted(secret)}, and secret are {sorted(named)}"
    if secret | plain != set(files) or secret & plain:
        yield f"the home is {sorted(files)}, and mounted are {sorted(secret | plain)}"
    (home,) = (volume["projected"] for volume in pod(objects)["volumes"] if volume["name"] == "home")
    sources = {kind: value["name"] for source in home["sources"] for kind, value in source.items()}
    names = {kind: one(objects, title)["metadata"]["name"] for kind, title in KINDS.items()}
    if sources != names:
        yield f"mounted are {sources}, and made are {names}"
    if home["defaultMode"] != 0o440:
        yield f"files of the home have mode {home['defaultMode']:04o}"


KINDS = {"secret": "Secret", "configMap": "ConfigMap"}


def wrong_images(root: Path) -> Iterator[str]:
    """Every image that is named is a target of the Dockerfile; whoever trains on GPUs gets one."""
    targets = re.findall(r"^FROM \S+ AS (\S+)", (root / "deploy/images/party.Dockerfile").read_text(), re.MULTILINE)
    for path in (root / FOLDER).rglob("*.yaml"):
        for target in re.findall(r"fate-llm-party:([\w-]+)", path.read_text(encoding="utf-8")):
            if target not in targets:
                yield f"{path.name} wants the image {target}, which nobody builds"
    objects = render(root / EXAMPLE)
    if len({container["image"] for container in containers(objects)}) != 1:
        yield "two images of one party"
    (container,) = pod(objects)["containers"]
    if ("nvidia.com/gpu" in container["resources"]["limits"]) != container["image"].endswith(":cuda"):
        yield "GPUs without their image, or the image without GPUs"


def wrong_broker(root: Path) -> Iterator[str]:
    """What the operator adds to its own configuration is what `federation init` would write."""
    spec = yaml.safe_load((root / BROKER).read_text(encoding="utf-8"))["spec"]
    setup = plan_setup(name="x", parties=["a", "b"], topology="shared", brokers=["mq.example"], nodes=3)
    mounted = "/etc/fate_llm"
    wanted = dict(settings(rabbitmq_conf(setup.federation, None, BrokerLimits(folder=mounted), port=5671)))
    for key, value in settings(spec["rabbitmq"]["additionalConfig"]):
        if wanted.get(key) != value:
            yield f"{key} is {value}, and `federation init` writes {wanted.get(key)}"
    own = {"listeners.tcp", "listeners.ssl.default", "cluster_name", "ssl_options.versions.1", "ssl_options.versions.2"}
    own |= {"ssl_options.cacertfile", "ssl_options.certfile", "ssl_options.keyfile"}  # the operator's, by spec.tls
    if missing := wanted.keys() - dict(settings(spec["rabbitmq"]["additionalConfig"])).keys() - own:
        yield f"nobody says {sorted(missing)}"
    template = spec["override"]["statefulSet"]["spec"]["template"]["spec"]
    ((mount,),) = (container["volumeMounts"] for container in template["containers"])
    if mount["mountPath"] != mounted or mount["name"] != template["volumes"][0]["name"]:
        yield "the definitions are not where they are looked for"
    if not spec["tls"]["disableNonTLSListeners"]:
        yield "it listens without TLS"


def settings(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        if line and not line.startswith("#"):
            key, _, value = line.partition(" = ")
            yield key, value


CHECKS = (
    wrong_standard,
    wrong_program,
    wrong_network,
    wrong_files,
    wrong_images,
    wrong_broker,
)


@pytest.mark.parametrize(
    "check", [pytest.param(check, marks=needs_service if check is wrong_program else ()) for check in CHECKS]
)
def test_the_manifests_are_what_program_and_cluster_need(check: Callable[[Path], Iterator[str]]) -> None:
    assert list(check(ROOT)) == []


SET = f"{BASE}/statefulset.yaml"


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        (SET, "runAsNonRoot: true", "runAsNonRoot: false", "root, or"),
        (SET, "fsGroup: 10001", "fsGroup: 1000", "user of the image"),
        (SET, "enableServiceLinks: false", "enableServiceLinks: true", "told of the cluster"),
        (SET, "emptyDir:\n            sizeLimit: 1Gi", "hostPath:\n            path: /srv", "not allowed"),
        (SET, "drop: [ALL]", "drop: [NET_RAW]", "keeps rights"),
        (SET, "readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false", "write to its root"),
        (SET, "limits:\n              memory: 4Gi", "limits:\n              cpu: 4", "all memory"),
        (SET, "args: [party, serve,", "args: [party, start,", "party start"),
        (SET, "--home, /var/lib/fate_llm]", "--home, /etc/fate_llm]", "the home is not"),
        (SET, "name: FATE_LLM_HOME", "name: FATE_HOME", "nobody reads"),
        (SET, "mountPath: /var/lib/fate_llm/state", "mountPath: /var/lib/fate_llm/jobs", "not read-only with"),
        (SET, "mountPath: /tmp", "mountPath: /temp", "temporary files"),
        (SET, "terminationGracePeriodSeconds: 15", "terminationGracePeriodSeconds: 2", "before it can end"),
        (SET, "/v1/health", "/health", "the API has no"),
        (SET, "livenessProbe:\n            tcpSocket:", "livenessProbe:\n            httpGet:", "started anew"),
        (SET, "subPath: state", "subPath: jobs", "made for it"),
        (SET, "containerPort: 8470", "containerPort: 8080", "not on 8470"),
        (SET, "port: api\n            periodSeconds: 20", "port: 80\n            periodSeconds: 20", "another port"),
        (SET, "replicas: 1", "replicas: 2", "not one of the party"),
        (f"{BASE}/service.yaml", "targetPort: api", "targetPort: http", "not on 8470"),
        (
            f"{BASE}/service.yaml",
            "    app.kubernetes.io/name: fate-llm-party\n  ports",
            "    app: x\n  ports",
            "other pods",
        ),
        (f"{BASE}/networkpolicy.yaml", "podSelector: {}", "namespaceSelector: {}", "others than this"),
        (f"{BASE}/networkpolicy.yaml", "port: 5671", "port: 5672", "out go"),
        (f"{BASE}/poddisruptionbudget.yaml", "      app.kubernetes.io/name:", "      app:", "other pods"),
        (f"{EXAMPLE}/kustomization.yaml", "home/sealing.key", "home/seal.key", "in the Secret"),
        (f"{EXAMPLE}/kustomization.yaml", "      - home/catalog.yaml\n", "", "the home is"),
        (
            f"{EXAMPLE}/kustomization.yaml",
            "configMapGenerator:\n  - name: fate",
            "configMapGenerator:\n  - name: x",
            "made are",
        ),
        (SET, "defaultMode: 0440", "defaultMode: 0444", "have mode"),
        (f"{FOLDER}/components/gpu/kustomization.yaml", "fate-llm-party:cuda", "fate-llm-party:gpu", "nobody builds"),
        (f"{FOLDER}/components/gpu/kustomization.yaml", ', nvidia.com/gpu: "1"', "", "GPUs"),
        (BROKER, "heartbeat = 30", "heartbeat = 3600", "heartbeat is 3600"),
        (BROKER, "      channel_max = 64\n", "", "nobody says"),
        (BROKER, "mountPath: /etc/fate_llm", "mountPath: /etc/rabbitmq", "looked for"),
        (BROKER, "disableNonTLSListeners: true", "disableNonTLSListeners: false", "without TLS"),
    ],
)
def test_a_wrong_word_in_a_manifest_is_found(spoiled: Any, file: str, old: str, new: str, said: str) -> None:
    root = spoiled(file, old, new)
    found = (text for check in CHECKS for text in check(root))
    assert any(said in text for text in found)


# --- Schemas and kubectl ---------------------------------------------------------------------------------------------


def valid_objects() -> list[dict[str, Any]]:
    """The example, with content for what is generated."""
    objects = render(ROOT / EXAMPLE)
    return [{**item, "data": {}} if item["kind"] in KINDS.values() else item for item in objects]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_fits_its_schema(version: str) -> None:
    validate = library("kubernetes_validate").validate
    objects = valid_objects()
    assert len(objects) == 8
    for item in objects:
        assert validate(item, version, strict=True) == version


def test_the_schemas_refuse_what_is_none() -> None:
    found = library("kubernetes_validate")
    item = one(valid_objects(), "StatefulSet")
    item["spec"]["template"]["spec"]["containers"][0]["imagePolicy"] = "Always"
    with pytest.raises(found.ValidationError):
        found.validate(item, VERSIONS[-1], strict=True)


@pytest.mark.slow
def test_kubectl_renders_the_same(tmp_path: Path) -> None:
    """Not in CI, which has no kubectl: there our own rendering is what is checked."""
    tool = shutil.which("kubectl")
    if tool is None:
        pytest.skip("kubectl is not installed")
    shutil.copytree(ROOT / "deploy/kubernetes/party", tmp_path / "party")
    home = tmp_path / "party" / "example" / "home"
    home.mkdir()
    for name, content in home_files().items():
        (home / name).write_bytes(content)
    for folder in ("base", "example"):
        done = subprocess.run(
            [tool, "kustomize", tmp_path / "party" / folder], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert normal(list(yaml.safe_load_all(done.stdout))) == normal(render(ROOT / FOLDER / folder))


def test_our_rendering_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text("helmCharts: []\n", encoding="utf-8")
    with pytest.raises(ValueError, match="helmCharts"):
        render(tmp_path)
    wrong = "patches:\n- target: {kind: StatefulSet, name: x}\n  patch: '[]'\n"
    (tmp_path / "kustomization.yaml").write_text(wrong, encoding="utf-8")
    with pytest.raises(ValueError, match="not there"):
        render(tmp_path)
