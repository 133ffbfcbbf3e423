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

# A peer's own log goes where its errors go.
_LOOP = """
import json, os, sys, time
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
def timed(length, new):
    start = time.perf_counter()
    prefill(length)
    middle = time.perf_counter()
    for _ in range(new - 1):
        step()
    return middle - start, (time.perf_counter() - middle) / (new - 1)
{setup}
print(json.dumps(versions), file=answers, flush=True)
for line in sys.stdin:
    length, new = map(int, line.split())
    work = time.process_time()
    figures = timed(length, new)
    work = time.process_time() - work
    print(json.dumps([*figures, work]), file=answers, flush=True)
"""

# SmolLM2's shape with random weights, which cost the same.
_TRANSFORMERS = """
import torch, transformers
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
versions = f"transformers {{transformers.__version__}}, torch {{torch.__version__}}"
"""

# The file that our weights come from, as it is. Of two packages the first that is
# there: llama-cpp-python evaluates tokens; xllamacpp has llama.cpp's server alone,
# which times a request itself (its first token is of the prompt's last one).
_LLAMA = """
def tokens(length):
    return [(7919 * place) % 49000 + 100 for place in range(length)]
try:
    import llama_cpp
except ImportError:
    import xllamacpp
    settings = xllamacpp.CommonParams()
    settings.model.path = {file!r}
    settings.n_ctx, settings.n_parallel, settings.cache_ram_mib = 8192, 1, 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = {threads}
    # Its fused attention takes 1.65 times as long for a token behind 8,064.
    settings.flash_attn_type = (
        xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    )
    server = xllamacpp.Server(settings)
    def timed(length, new):
        found = server.handle_completions(dict(
            prompt=tokens(length), n_predict=new, ignore_eos=True, cache_prompt=False,
            temperature=0, samplers=["temperature"],
        ))["timings"]
        assert (found["prompt_n"], found["predicted_n"]) == (length, new), found
        return found["prompt_ms"] / 1e3, found["predicted_ms"] / 1e3 / (new - 1)
    versions = f"xllamacpp {{xllamacpp.__version__}}, {{xllamacpp.get_system_info()}}"
else:
    model = llama_cpp.Llama(
        {file!r}, n_ctx=8192, n_threads={threads}, n_threads_batch={threads},
        verbose=False,
    )
    def prefill(length):
        model.reset()
        model.eval(tokens(length))
    def step():
        model.eval([1000])
    versions = f"llama-cpp-python {{llama_cpp.__version__}}, "
    versions += llama_cpp.llama_print_system_info().decode().strip()
"""


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
    return Peer(python, _LOOP.format(setup=_TRANSFORMERS.format(threads=threads)))


def llama_peer(python: str, file: str, threads: int) -> Peer:
    """llama.cpp, through llama-cpp-python or xllamacpp, with a GGUF file."""
    setup = _LLAMA.format(file=file, threads=threads)
    return Peer(python, _LOOP.format(setup=setup))
