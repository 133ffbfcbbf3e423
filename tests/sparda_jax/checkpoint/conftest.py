"""Small models in every file format, made for the tests."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import gguf
import numpy as np
import pytest

from sparda_jax.checkpoint import layout
from sparda_jax.checkpoint.forecast import ForecastWeights, save_forecast
from sparda_jax.checkpoint.hf import save_hf
from sparda_jax.cli.main import main
from sparda_jax.config import ModelConfig
from sparda_jax.models.spec import base_shapes

Types = gguf.GGMLQuantizationType

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def byte_alphabet() -> list[str]:
    """The character that stands for each byte in byte-level tokens."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    table = {byte: chr(byte) for byte in plain}
    table |= {byte: chr(256 + number) for number, byte in enumerate(rest)}
    return [table[byte] for byte in range(256)]


MERGES = ("h e", "l l", "he ll", "hell o", "Ġ w", "Ġ Ġ")
TOKENS = (*SPECIAL, *byte_alphabet(), *(merge.replace(" ", "") for merge in MERGES))


@dataclasses.dataclass
class Kit:
    """Makers of configurations, weights and files."""

    folder: pathlib.Path

    @functools.cached_property
    def config(self) -> ModelConfig:
        return ModelConfig(
            name="tiny",
            vocab_size=len(TOKENS),
            hidden_size=32,
            ffn_size=64,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            max_context=256,
            tie_embeddings=True,
            eos_ids=(2, 0),
        )

    def tensors(self, config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
        """Random float32 weights."""
        rng = np.random.default_rng(seed)
        return {
            name: rng.standard_normal(shape).astype(np.float32)
            for name, shape in base_shapes(config)
        }

    def forecast(self, config: ModelConfig, seed: int = 1) -> dict[str, np.ndarray]:
        """Random Forecast weights."""
        rng = np.random.default_rng(seed)
        shapes = layout.forecast_shapes(config)
        return {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}

    def metadata(self, config: ModelConfig, arch: str = "llama") -> dict[str, Any]:
        """GGUF metadata of a model with the small tokenizer."""
        return {
            "general.name": config.name,
            f"{arch}.block_count": config.num_layers,
            f"{arch}.context_length": config.max_context,
            f"{arch}.embedding_length": config.hidden_size,
            f"{arch}.feed_forward_length": config.ffn_size,
            f"{arch}.attention.head_count": config.num_heads,
            f"{arch}.attention.head_count_kv": config.num_kv_heads,
            f"{arch}.rope.freq_base": config.rope.theta,
            f"{arch}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.tokens": list(TOKENS),
            "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(TOKENS) - 3),
            "tokenizer.ggml.merges": list(MERGES),
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.add_bos_token": False,
            "tokenizer.chat_template": TEMPLATE,
            "tokenizer.chat_template.tool_use": "{{ tools|length }}",
        }

    def exported(
        self, folder: pathlib.Path, weights: ForecastWeights
    ) -> tuple[pathlib.Path, pathlib.Path, pathlib.Path]:
        """A base model, its heads, and both in one as `sparda export` writes it."""
        base, heads, out = (folder / x for x in ("base", "heads.safetensors", "whole"))
        save_hf(base, self.config, self.tensors(self.config))
        save_forecast(heads, weights, base_name="m")
        given = ["--model", str(base), "--forecast", str(heads), "--out", str(out)]
        assert main(["export", *given, "--dtype", "float32"]) == 0
        return base, heads, out

    def write_gguf(
        self,
        metadata: Mapping[str, Any],
        tensors: Mapping[str, np.ndarray],
        *,
        arch: str = "llama",
        kinds: Mapping[str, Types] | None = None,
        raw_kinds: Mapping[str, Types] | None = None,
        name: str = "model.gguf",
    ) -> pathlib.Path:
        """Writes a GGUF file with the library's writer; None leaves a key out.

        Tensors of `kinds` are quantised, those of `raw_kinds` are already.
        """
        path = self.folder / name
        writer = gguf.GGUFWriter(path, arch)
        for key, value in metadata.items():
            if value is None or key == "general.architecture":
                continue
            if isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, str):
                writer.add_string(key, value)
            elif isinstance(value, int):
                (writer.add_uint32 if value >= 0 else writer.add_int32)(key, value)
            elif isinstance(value, float):
                writer.add_float32(key, value)
            else:
                writer.add_array(key, value)
        for key, array in tensors.items():
            kind = (kinds or {}).get(key)
            raw_kind = (raw_kinds or {}).get(key)
            if raw_kind is not None:
                writer.add_tensor(key, np.ascontiguousarray(array), raw_dtype=raw_kind)
            elif kind is None:
                writer.add_tensor(key, np.ascontiguousarray(array))
            else:
                raw = gguf.quantize(np.ascontiguousarray(array), kind)
                writer.add_tensor(key, raw, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def gguf_tensors(
        self, config: ModelConfig, tensors: Mapping[str, np.ndarray], permute: bool
    ) -> dict[str, np.ndarray]:
        """Hugging Face arrays to GGUF names, q and k permuted as the converter does."""
        names = {
            "model.embed_tokens.weight": "token_embd.weight",
            "model.norm.weight": "output_norm.weight",
            "lm_head.weight": "output.weight",
        }
        parts = {
            "input_layernorm": "attn_norm",
            "self_attn.q_proj": "attn_q",
            "self_attn.k_proj": "attn_k",
            "self_attn.v_proj": "attn_v",
            "self_attn.q_norm": "attn_q_norm",
            "self_attn.k_norm": "attn_k_norm",
            "self_attn.o_proj": "attn_output",
            "post_attention_layernorm": "ffn_norm",
            "mlp.gate_proj": "ffn_gate",
            "mlp.up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
            "mlp.gate": "ffn_gate_inp",
            "mlp.experts.gate_proj": "ffn_gate_exps",
            "mlp.experts.up_proj": "ffn_up_exps",
            "mlp.experts.down_proj": "ffn_down_exps",
        }
        out = {}
        for name, array in tensors.items():
            if name in names:
                out[names[name]] = array
                continue
            _, _, layer, rest = name.split(".", 3)
            middle, _, kind = rest.rpartition(".")
            heads = {
                "self_attn.q_proj": config.num_heads,
                "self_attn.k_proj": config.num_kv_heads,
            }.get(middle)
            if permute and heads:
                halves = array.reshape(heads, 2, config.head_dim // 2, -1)
                array = halves.swapaxes(1, 2).reshape(array.shape)
            out[f"blk.{layer}.{parts[middle]}.{kind}"] = array
        return out

    def tiny_gguf(self) -> pathlib.Path:
        """A whole small model of architecture llama."""
        tensors = self.tensors(self.config)
        return self.write_gguf(
            self.metadata(self.config), self.gguf_tensors(self.config, tensors, True)
        )

    def edit_json(
        self, path: pathlib.Path, change: Callable[[dict[str, Any]], Any]
    ) -> None:
        """Changes a JSON file in place."""
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))


@pytest.fixture
def kit(tmp_path: pathlib.Path) -> Kit:
    return Kit(tmp_path)


@pytest.fixture(scope="session")
def session_kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    """For files that many examples read."""
    return Kit(tmp_path_factory.mktemp("kit"))


@pytest.fixture
def saved(kit: Kit) -> pathlib.Path:
    """A small untied model with Forecast heads as a safetensors directory."""
    config = dataclasses.replace(kit.config, tie_embeddings=False)
    save_hf(kit.folder / "m", config, kit.tensors(config) | kit.forecast(config))
    return kit.folder / "m"
