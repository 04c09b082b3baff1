"""The part of kustomize that our manifests use, so that they are checked where there is no kubectl, too."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .program import documents

__all__ = ["normal", "render"]

Object = dict[str, Any]
KNOWN = {
    "apiVersion",
    "kind",
    "labels",
    "namespace",
    "resources",
    "components",
    "patches",
    "images",
    "secretGenerator",
    "configMapGenerator",
}


def render(folder: Path) -> list[Object]:
    """All objects of a folder with a kustomization.yaml; generated ones have a name without a digest, and no content.

    Raises:
        ValueError: it uses something else of kustomize.
    """
    found = documents((folder / "kustomization.yaml").read_text(encoding="utf-8"))[0]
    if unknown := found.keys() - KNOWN:
        raise ValueError(f"{folder}: {sorted(unknown)} are not understood here")
    objects: list[Object] = []
    for name in found.get("resources", ()):
        path = folder / name
        if path.is_dir():
            objects += render(path)
        else:  # through JSON, so that what YAML's anchors share is not changed in two places
            objects += json.loads(json.dumps(documents(path.read_text(encoding="utf-8"))))
    for kind in ("configMap", "secret"):
        for one in found.get(f"{kind}Generator", ()):
            files = [Path(file).name for file in one["files"]]
            title = kind[0].upper() + kind[1:]
            objects.append({"apiVersion": "v1", "kind": title, "metadata": {"name": one["name"]}, "data": files})
    for component in found.get("components", ()):
        patch_all(objects, documents((folder / component / "kustomization.yaml").read_text(encoding="utf-8"))[0])
    patch_all(objects, found)
    return objects


def patch_all(objects: list[Object], found: Mapping[str, Any]) -> None:
    """Labels, patches, images and the namespace of one kustomization."""
    for one in found.get("labels", ()):
        for item in objects:
            item["metadata"].setdefault("labels", {}).update(one["pairs"])
    for one in found.get("patches", ()):
        target = one["target"]
        chosen = [o for o in objects if o["kind"] == target["kind"] and o["metadata"]["name"] == target["name"]]
        if not chosen:
            raise ValueError(f"a patch for {target}, which is not there")
        for item in chosen:
            for step in documents(one["patch"])[0]:
                patch(item, step)
    for image in found.get("images", ()):
        for container in containers(objects):
            name, _, tag = container["image"].rpartition(":")
            if name == image["name"]:
                container["image"] = f"{image['newName']}:{tag}"
    if "namespace" in found:
        for item in objects:
            if item["kind"] != "Namespace":
                item["metadata"]["namespace"] = found["namespace"]


def containers(objects: list[Object]) -> list[Object]:
    """Of all pods, the first ones included."""
    pods = [item["spec"]["template"]["spec"] for item in objects if item["kind"] == "StatefulSet"]
    return [one for pod in pods for one in (*pod.get("initContainers", ()), *pod["containers"])]


def patch(item: Object, step: Mapping[str, Any]) -> None:
    """One operation of JSON Patch (RFC 6902): add or replace."""
    *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in step["path"].split("/")[1:]]
    place: Any = item
    for part in parents:
        place = place[int(part)] if isinstance(place, list) else place[part]
    value = copy.deepcopy(step["value"])
    if isinstance(place, list) and last == "-" and step["op"] == "add":
        place.append(value)
    elif isinstance(place, dict) and (step["op"] == "add" or (step["op"] == "replace" and last in place)):
        place[last] = value
    else:
        raise ValueError(f"{step['op']} {step['path']} cannot be done")


def normal(objects: list[Object]) -> list[Object]:
    """Without what generators add, in one order: for a comparison with kubectl's own rendering."""
    generated = {}
    for item in objects:
        if item["kind"] in ("ConfigMap", "Secret"):
            plain = item["metadata"]["name"].removesuffix("-" + item["metadata"]["name"].rpartition("-")[2])
            generated[item["metadata"]["name"]] = plain if isinstance(item["data"], dict) else item["metadata"]["name"]
    text = yaml.safe_dump(
        [
            {**item, "data": sorted(item["data"]), "type": ""} if item["kind"] in ("ConfigMap", "Secret") else item
            for item in objects
        ]
    )
    for name, plain in generated.items():
        text = text.replace(name, plain) if name != plain else text
    return sorted(yaml.safe_load(text), key=lambda item: (item["kind"], item["metadata"]["name"]))
