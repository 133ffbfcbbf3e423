"""The Kubernetes example is what Kubernetes takes, and what the server answers."""

import pathlib

import kubernetes_validate
import pytest
import yaml

from sparda_jax.cli.main import build_parser

_EXAMPLE = pathlib.Path(__file__).parents[2] / "deploy" / "kubernetes.yaml"


@pytest.fixture(scope="module")
def resources():
    return {one["kind"]: one for one in yaml.safe_load_all(_EXAMPLE.read_text("utf-8"))}


def test_the_schemas_of_kubernetes_take_it(resources):
    assert resources.keys() == {"Deployment", "Service"}
    for resource in resources.values():
        kubernetes_validate.validate(resource, "1.35", strict=True)
    broken = {**resources["Service"], "specs": {}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, "1.35", strict=True)


def test_its_variables_and_probes_are_the_server_s(resources, monkeypatch):
    pod = resources["Deployment"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    for variable in container["env"]:
        monkeypatch.setenv(variable["name"], variable.get("value", "a-key"))
    arguments = build_parser().parse_args(container["command"][1:])
    assert arguments.max_context == 32768 and arguments.api_key == "a-key"
    for variable in container["env"]:
        name = variable["name"].removeprefix("SPARDA_SERVE_").lower()
        assert str(getattr(arguments, name)) == variable.get("value", "a-key")
    probes = {name: container[name]["httpGet"] for name in container if "Probe" in name}
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startupProbe": "/health",
        "readinessProbe": "/health",
        "livenessProbe": "/live",
    }
    (port,) = container["ports"]
    assert all(probe["port"] == port["containerPort"] for probe in probes.values())
    labels = pod["metadata"]["labels"].items()
    assert resources["Service"]["spec"]["selector"].items() <= labels
