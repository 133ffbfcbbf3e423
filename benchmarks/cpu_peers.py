"""What the CPU benchmark compares with, each in a process and interpreter of its own.

A peer loads once, then answers a line on its input, the length of a prompt, with a line
of JSON: seconds of the prefill, of a decoded token and of processor time in all. So its
runs can alternate with ours, and the two never share a thread pool.
"""

import json
import subprocess
import tempfile
from typing import NamedTuple, Self

from sparda_jax.checks import ConfigError

_LOOP = """
import json, os, sys, time
import {module}
{setup}
print(json.dumps({versions}), flush=True)
for line in sys.stdin:
    length, new = map(int, line.split())
    work, start = time.process_time(), time.perf_counter()
    prefill(length)
    middle = time.perf_counter()
    for _ in range(new - 1):
        step()
    end = time.perf_counter()
    print(json.dumps([
        middle - start, (end - middle) / (new - 1), time.process_time() - work
    ]), flush=True)
"""

# SmolLM2's shape with random weights, which cost the same.
_TRANSFORMERS = """
import torch
torch.set_num_threads({threads})
from transformers import LlamaConfig, LlamaForCausalLM
transformers.logging.set_verbosity_error()
torch.manual_seed(0)
torch.set_grad_enabled(False)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
    num_attention_heads=9, num_key_value_heads=3, head_dim=64,
    max_position_embeddings=8192, rope_theta=100000.0, rms_norm_eps=1e-5,
    tie_word_embeddings=True,
)).eval()
ids = torch.randint(0, 49152, (1, 8192))
def feed(tokens, cache):
    global held, token
    out = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    held, token = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
def prefill(length):
    feed(ids[:, :length], None)
def step():
    feed(token, held)
"""
_TRANSFORMERS_VERSIONS = (
    'f"transformers {transformers.__version__}, torch {torch.__version__}"'
)

# The file that our weights come from, as it is.
_LLAMA = """
model = llama_cpp.Llama(
    {file!r}, n_ctx=8192, n_threads={threads}, n_threads_batch={threads}, verbose=False
)
def prefill(length):
    model.reset()
    model.eval([(7919 * place) % 49000 + 100 for place in range(length)])
def step():
    model.eval([1000])
"""
_LLAMA_VERSIONS = (
    'f"llama-cpp-python {llama_cpp.__version__}, "'
    " + llama_cpp.llama_print_system_info().decode().strip()"
)


class Timing(NamedTuple):
    """One call.

    Attributes:
      prefill: Seconds of the prompt.
      decode: Seconds of a token behind it.
      work: Processor seconds of the call, over all threads.
    """

    prefill: float
    decode: float
    work: float


class Peer:
    """A running peer; it ends with the `with` block."""

    versions: str

    def __init__(self, python: str, script: str):
        """Starts a peer's script and waits until it has loaded."""
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [python, "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self.versions = self._line()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def run(self, length: int, new: int) -> Timing:
        """Times a prompt of `length` tokens and `new` − 1 tokens behind it."""
        assert self._process.stdin is not None
        print(length, new, file=self._process.stdin, flush=True)
        return Timing(*self._line())

    def _line(self):
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            raise ConfigError(f"the peer failed: {self._errors.read().strip()[-800:]}")
        return json.loads(line)


def transformers_peer(python: str, threads: int) -> Peer:
    """Transformers with torch: SmolLM2's shape, dense, float32."""
    setup = _TRANSFORMERS.format(threads=threads)
    versions = _TRANSFORMERS_VERSIONS
    script = _LOOP.format(module="transformers", setup=setup, versions=versions)
    return Peer(python, script)


def llama_peer(python: str, file: str, threads: int) -> Peer:
    """llama.cpp, through llama-cpp-python, with a GGUF file."""
    setup = _LLAMA.format(file=file, threads=threads)
    versions = _LLAMA_VERSIONS
    script = _LOOP.format(module="llama_cpp", setup=setup, versions=versions)
    return Peer(python, script)
