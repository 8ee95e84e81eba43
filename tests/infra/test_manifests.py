"""The files for other people's machines, checked against what will read them, as far as this machine can."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from kubernetes.client import models
from packaging.requirements import Requirement
from packaging.version import Version
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config

from bge_ray.settings.sections import parse_settings
from tests.support.runs import REPOSITORY

INFRA = REPOSITORY / "infra"
SCHEMAS = json.loads((Path(__file__).parent / "kuberay_v1.json").read_text())


def load(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((INFRA / name).read_text()))


def check_kubernetes(value: Any, kind: str, path: str = "") -> None:
    """Hold a value against the types of Kubernetes' own client: fields by name, and their types."""
    if value is None:
        return
    if kind.startswith("List["):
        assert isinstance(value, list), path
        for number, item in enumerate(value):
            check_kubernetes(item, kind[5:-1], f"{path}[{number}]")
    elif kind.startswith("Dict["):
        assert isinstance(value, dict), path
        for key, item in value.items():
            check_kubernetes(item, kind.partition(", ")[2][:-1], f"{path}.{key}")
    elif hasattr(models, kind):
        model = getattr(models, kind)
        assert isinstance(value, dict), path
        names = {json_name: name for name, json_name in model.attribute_map.items()}
        assert set(value) <= set(names), f"{path}: {set(value) - set(names)} are no fields of {kind}"
        for name, item in value.items():
            check_kubernetes(item, model.openapi_types[names[name]], f"{path}.{name}")
    else:
        expected = {"str": str, "int": int, "bool": bool, "float": (int, float), "object": object}[kind]
        assert isinstance(value, expected), f"{path}: {value!r} is not {kind}"


def pod_templates(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [group["template"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


@pytest.mark.parametrize(("name", "kind"), [("raycluster", "RayCluster"), ("rayjob", "RayJob")])
def test_kuberay_manifests_fit_the_schema_and_their_pods_fit_kubernetes(name: str, kind: str) -> None:
    [manifest] = load(f"kuberay/{name}.yaml")
    jsonschema.validate(manifest, SCHEMAS | {"$ref": f"#/$defs/{kind}"})
    check_kubernetes(manifest["metadata"], "V1ObjectMeta")
    spec = manifest["spec"] if kind == "RayCluster" else manifest["spec"]["rayClusterSpec"]
    for template in pod_templates(spec):
        check_kubernetes(template, "V1PodTemplateSpec")


def test_the_checks_notice_what_is_wrong() -> None:
    [manifest] = load("kuberay/rayjob.yaml")
    wrong = manifest | {"spec": manifest["spec"] | {"backOffLimit": 1}}
    with pytest.raises(jsonschema.ValidationError, match="backOffLimit"):
        jsonschema.validate(wrong, SCHEMAS | {"$ref": "#/$defs/RayJob"})
    with pytest.raises(AssertionError, match="runAsRoot"):
        check_kubernetes({"spec": {"securityContext": {"runAsRoot": False}}}, "V1PodTemplateSpec")
    with pytest.raises(AssertionError, match="fsGroup"):
        check_kubernetes({"spec": {"securityContext": {"fsGroup": "1000"}}}, "V1PodTemplateSpec")


def test_both_clusters_are_the_same_and_ask_for_no_more_than_they_must() -> None:
    [cluster], [job] = load("kuberay/raycluster.yaml"), load("kuberay/rayjob.yaml")
    spec = cluster["spec"]
    assert job["spec"]["rayClusterSpec"] == spec
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert not spec["headGroupSpec"]["enableIngress"]
    for template in pod_templates(spec):
        assert template["spec"]["securityContext"]["runAsNonRoot"]
        for container in template["spec"]["containers"]:
            assert not container["securityContext"]["allowPrivilegeEscalation"]
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert {"cpu", "memory", "ephemeral-storage"} <= set(container["resources"]["limits"])
    assert Version(spec["rayVersion"]) == Version(pinned("ray"))


def test_rays_autoscaler_reads_groups_that_scale_from_zero() -> None:
    [cluster] = load("kuberay/raycluster.yaml")
    cluster["metadata"]["namespace"] = "default"
    types = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert (types["gpu"]["min_workers"], types["gpu"]["max_workers"]) == (0, 16)
    assert (types["gpu"]["resources"]["GPU"], types["gpu"]["resources"]["CPU"]) == (1, 8)
    assert types["cpu"]["min_workers"] == 0


def test_the_entrypoint_is_a_command_that_the_job_takes() -> None:
    [job] = load("kuberay/rayjob.yaml")
    words = shlex.split(job["spec"]["entrypoint"])
    assert (REPOSITORY / Path(words[1]).relative_to("/opt/bge-ray")).exists()
    settings = parse_settings(None, [words[i + 1] for i, word in enumerate(words) if word == "--set"])
    # Without these a job could not know how many GPUs a cluster that scales from zero may have.
    assert settings.resources.num_encoders
    assert settings.resources.gpus_per_encoder
    assert settings.model.dtype == "float16"


def test_access_is_what_kubernetes_knows_and_names_what_the_pods_use() -> None:
    kinds = {
        "ServiceAccount": "V1ServiceAccount",
        "Role": "V1Role",
        "RoleBinding": "V1RoleBinding",
        "Secret": "V1Secret",
    }
    documents = {document["kind"]: document for document in load("kuberay/access.yaml")}
    assert documents.keys() == kinds.keys()
    for kind, document in documents.items():
        check_kubernetes(document, kinds[kind])
    [cluster] = load("kuberay/raycluster.yaml")
    for template in pod_templates(cluster["spec"]):
        assert template["spec"]["serviceAccountName"] == documents["ServiceAccount"]["metadata"]["name"]
        [secret] = template["spec"]["containers"][0]["envFrom"]
        assert secret["secretRef"]["name"] == documents["Secret"]["metadata"]["name"]


def test_the_launcher_file_fits_rays_own_schema() -> None:
    [config] = load("ray-cluster/aws.yaml")
    validate_config(prepare_config(config))
    types = config["available_node_types"]
    assert types["gpu"]["min_workers"] == 0
    assert types["gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert all("IamInstanceProfile" in kind["node_config"] for kind in types.values())


def container_steps() -> list[str]:
    text = (INFRA / "container/Containerfile").read_text()
    text = re.sub(r"^#.*\n", "", text, flags=re.M).replace("\\\n", "")
    return [line for line in text.splitlines() if line.strip()]


def test_the_containerfile_copies_what_is_there_and_runs_as_no_root() -> None:
    copied = [shlex.split(step)[1:-1] for step in container_steps() if step.startswith("COPY")]
    sources = {source for words in copied for source in words}
    assert all((REPOSITORY / source).exists() for source in sources)
    assert {"bge_ray", "jobs", "configs", "constraints.txt", "pyproject.toml"} <= sources
    allowed = (REPOSITORY / ".containerignore").read_text().splitlines()
    assert sources == {line[1:] for line in allowed if line.startswith("!")}
    assert [step for step in container_steps() if step.startswith("USER")] == ["USER 1000:1000"]
    [base] = [step for step in container_steps() if step.startswith("FROM")]
    requires = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["requires-python"]
    assert Requirement(f"python{requires}").specifier.contains(re.search(r"python:([\d.]+)", base)[1])


def test_the_containers_requirements_are_the_projects_and_fit_the_constraints() -> None:
    [step] = [step for step in container_steps() if "requirements.txt" in step]
    program = shlex.split(step.removeprefix("RUN "))[2]
    for extra in ("gpu", "cpu"):
        made = subprocess.run(
            [sys.executable, "-c", program, extra],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        )
        requirements = [Requirement(line) for line in made.stdout.splitlines()]
        assert {"ray", "torch", "transformers", f"faiss-{extra}"} <= {r.name for r in requirements}
        for requirement in requirements:
            version = pinned(requirement.name)
            assert version is None or requirement.specifier.contains(version), requirement
    assert pinned("torch")


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    found = subprocess.run(
        [hadolint, "infra/container/Containerfile"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout


def pinned(name: str) -> str | None:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    return next((line.partition("==")[2] for line in lines if line.partition("==")[0] == name), None)
