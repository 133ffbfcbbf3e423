"""Replicas behind a Ray of this machine: more where rows are waited for."""

import json
import os
import pathlib
import subprocess

import pytest

_ROOT = pathlib.Path(__file__).parents[2]
# In a process of its own: Ray and what it needs are in the clients' environment.
_LOAD = """
import json, sys, threading, time, urllib.request
import ray
from ray import serve

ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
import ray_serve

config = ray_serve.Replica._deployment_config.autoscaling_config.model_copy(
    update={"max_replicas": 2, "upscale_delay_s": 1, "downscale_delay_s": 600}
)
serve.run(ray_serve.Replica.options(autoscaling_config=config).bind())
url = f"http://127.0.0.1:{sys.argv[1]}"
answers, going = [], threading.Event()

def ask():
    body = {"prompt": [5, 6, 7], "max_tokens": 400, "temperature": 0,
            "ignore_eos": True, "logprobs": 0}
    data = json.dumps(body).encode()
    while not going.is_set():
        request = urllib.request.Request(url + "/v1/completions", data)
        with urllib.request.urlopen(request, timeout=1800) as answer:
            read = json.loads(answer.read())
            answers.append(read["choices"][0]["logprobs"]["token_logprobs"])

def replicas():
    found = serve.status().applications["default"].deployments["Replica"]
    return found.replica_states.get("RUNNING", 0)

with urllib.request.urlopen(url + "/health", timeout=1800) as health:
    ready = json.loads(health.read())
before = replicas()
users = [threading.Thread(target=ask) for _ in range(16)]
for user in users:
    user.start()
begun = time.monotonic()
while replicas() < 2 and time.monotonic() - begun < 1800:
    time.sleep(0.5)
after = replicas()
going.set()
for user in users:
    user.join()
same = all(answer == answers[0] for answer in answers)
print("found", json.dumps([ready, before, after, len(answers), same]))
serve.shutdown()
ray.shutdown()
"""


@pytest.mark.slow
def test_waiting_rows_start_a_second_replica(clients_python, free_port):
    settings = {
        "MODEL": "tiny",
        "MAX_BATCH": "1",
        "MAX_CONTEXT": "512",
        "MAX_NEW_TOKENS": "400",
        "PREFIX_BYTES": "0",
    }
    environment = {
        **os.environ,
        **{f"SPARDA_SERVE_{name}": value for name, value in settings.items()},
        "PYTHONPATH": os.pathsep.join((str(_ROOT), str(_ROOT / "deploy"))),
        "RAY_USAGE_STATS_ENABLED": "0",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [clients_python, "-c", _LOAD, str(free_port)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    found = done.stdout.partition("found ")[2].splitlines()[0]
    ready, before, after, answered, same = json.loads(found)
    assert ready == {"status": "ready"} and (before, after) == (1, 2)
    assert answered >= 16 and same
