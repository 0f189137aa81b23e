"""from_pretrained: the right bytes, once, from every kind of checkpoint transformers can load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB, experts_modules, family, plain_model, prompt_ids, tiny_model
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

import moe_offload
from moe_offload import memory
from moe_offload.dense import use_dense_kernels
from moe_offload.errors import BudgetError, CheckpointError, StateError, UnsupportedModelError
from moe_offload.huggingface import loading
from moe_offload.huggingface.experts import NAME
from moe_offload.safetensors_file import Checkpoint, read_header


def logits(model: Any, prompt: Tensor | None = None) -> Tensor:
    model.set_experts_implementation(NAME)  # also once restored: the kernels of the slots
    use_dense_kernels(model)
    with torch.no_grad():
        return model(prompt_ids() if prompt is None else prompt).logits


def io_mode(model: PreTrainedModel) -> str:
    return moe_offload.get_offloader(model).stats()["io_mode"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    saved = {}
    for name in ("mixtral", "qwen3_moe", "granitemoe", "gpt_oss"):
        saved[name] = tmp_path_factory.mktemp(name)
        tiny_model(name).save_pretrained(saved[name])
    return saved


def test_every_dense_byte_is_read_once_and_expert_bytes_only_into_slots(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[tuple[int, int]] = []
    original = Checkpoint._read_into

    def counting(self: Checkpoint, path: str, offset: int, out: memoryview, name: str) -> None:
        reads.append((offset, len(out)))
        original(self, path, offset, out, name)

    monkeypatch.setattr(Checkpoint, "_read_into", counting)
    model = moe_offload.from_pretrained(folders["qwen3_moe"], device_budget="25%")
    header = read_header(folders["qwen3_moe"] / "model.safetensors")
    dense = [(t.offset, t.nbytes) for key, t in header.items() if ".experts." not in key]
    assert sorted(reads) == sorted(dense)
    offloader = moe_offload.get_offloader(model)
    assert offloader.stats()["disk_bytes"] == 0
    logits(model)
    stats = offloader.stats()
    assert stats["demand_misses"] > 0
    assert (
        stats["demand_bytes"]
        <= stats["disk_bytes"]
        <= stats["demand_bytes"] + 4096 * 3 * (stats["demand_misses"])
    )
    assert sorted(reads) == sorted(dense), "experts must come through the pager alone"


def test_full_budget_reads_every_expert_byte_once(folders: dict[str, Path]) -> None:
    model = moe_offload.from_pretrained(folders["granitemoe"], device_budget="100%")
    offloader = moe_offload.get_offloader(model)
    header = read_header(folders["granitemoe"] / "model.safetensors")
    experts = sum(
        t.nbytes for key, t in header.items() if "put_linear" in key or ".experts." in key
    )
    assert offloader.stats()["fill_bytes"] == experts
    offloader.reset_stats()
    logits(model)
    assert offloader.stats()["disk_bytes"] == 0


def test_experts_never_exist_whole(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tensor as large as a fused expert parameter is ever made on the CPU."""
    model = moe_offload.from_pretrained(folders["qwen3_moe"], device_budget="25%")
    for _, module in experts_modules(model):
        assert list(module.parameters()) == []
        assert module.gate_up_proj.device.type == "meta"
    assert not any(".experts." in name for name in model.state_dict())


def test_restored_checkpoint_model_is_a_plain_resident_model(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    for name in ("qwen3_moe", "granitemoe", "gpt_oss"):
        model = moe_offload.from_pretrained(folders[name])
        plain = plain_model(folders[name])
        moe_offload.get_offloader(model).restore()
        assert list(model.state_dict()) == list(plain.state_dict())
        for key, tensor in plain.state_dict().items():
            assert torch.equal(model.state_dict()[key], tensor), key
        assert torch.equal(logits(model), logits(plain))
        model.save_pretrained(tmp_path / name)  # transformers' reverse conversion still knows how
        saved = load_file(tmp_path / name / "model.safetensors")
        before = load_file(folders[name] / "model.safetensors")
        assert set(saved) == set(before)
        assert all(torch.equal(saved[key], before[key]) for key in before)
        assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
        offloader = moe_offload.offload(model)  # and it can be offloaded again, from memory
        assert torch.equal(logits(model), logits(plain))
        offloader.close()


def test_restore_without_enough_memory_is_refused_and_changes_nothing(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = moe_offload.from_pretrained(folders["qwen3_moe"])
    expected = logits(model)
    monkeypatch.setattr(loading, "available_memory_bytes", lambda: 1000)
    with pytest.raises(StateError, match=r"only 1000 B are available.*stays offloaded"):
        moe_offload.get_offloader(model).restore()
    assert torch.equal(logits(model), expected)
    monkeypatch.undo()
    moe_offload.get_offloader(model).restore()
    assert torch.equal(logits(model), expected)


def test_available_memory_is_the_smaller_of_machine_and_container(tmp_path: Path) -> None:
    assert 0 < memory.available_memory_bytes() < 1 << 50
    proc, group = tmp_path / "proc", tmp_path / "sys/fs/cgroup"
    proc.mkdir()
    group.mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    4000 kB\n")
    assert memory.available_memory_bytes(str(tmp_path)) == 4000 * 1024
    (group / "memory.max").write_text("3000000\n")
    (group / "memory.current").write_text("2500000\n")
    (group / "memory.stat").write_text("anon 5\ninactive_file 150000\nactive_file 50000\n")
    assert memory.available_memory_bytes(str(tmp_path)) == 700_000
    (group / "memory.max").write_text("max\n")
    assert memory.available_memory_bytes(str(tmp_path)) == 4000 * 1024


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_dtype_goes_through_the_converter(
    name: str, dtype: torch.dtype, folders: dict[str, Path]
) -> None:
    model = moe_offload.from_pretrained(folders[name], dtype=dtype)
    plain = plain_model(folders[name], dtype=dtype)
    assert io_mode(model) == "converted"
    assert torch.equal(logits(model), logits(plain))
    assert moe_offload.get_offloader(model).stats()["disk_bytes"] > 0
    moe_offload.get_offloader(model).restore()
    assert torch.equal(logits(model), logits(plain))


def test_dtype_names_are_accepted(folders: dict[str, Path]) -> None:
    model = moe_offload.from_pretrained(folders["qwen3_moe"], dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    model = moe_offload.from_pretrained(folders["qwen3_moe"], dtype="float32")
    assert io_mode(model) in ("direct", "buffered")


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_sharded_checkpoints(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    loaded = moe_offload.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_expert_order_is_numeric_not_alphabetic(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe", num_experts=12, num_experts_per_tok=4)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(moe_offload.from_pretrained(tmp_path)), logits(model))


def test_base_model_checkpoint_loads_with_its_prefix_added(tmp_path: Path) -> None:
    """Tensors named without the `model.` prefix, as a bare decoder saves them."""
    model = tiny_model("qwen3_moe")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    bare = {key.removeprefix("model."): tensor for key, tensor in load_file(file).items()}
    save_file(bare, file, metadata={"format": "pt"})
    assert torch.equal(logits(moe_offload.from_pretrained(tmp_path)), logits(model))


def test_transposed_experts_on_disk_go_through_transformers_converter(tmp_path: Path) -> None:
    """Qwen3-VL-MoE checkpoints hold experts fused and transposed."""
    text = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "head_dim": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    config = transformers.AutoConfig.for_model(
        "qwen3_vl_moe", text_config=text, vision_config=vision, image_token_id=125
    )
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for key, tensor in tensors.items():
        if ".experts." in key:
            tensors[key] = tensor.transpose(1, 2).contiguous()
    assert tensors["model.language_model.layers.0.mlp.experts.gate_up_proj"].shape == (8, 32, 48)
    save_file(tensors, file, metadata={"format": "pt"})
    loaded = moe_offload.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert io_mode(loaded) == "converted"
    assert torch.equal(logits(loaded), logits(model))


def test_options_go_to_offloader_or_to_transformers(folders: dict[str, Path]) -> None:
    model, info = moe_offload.from_pretrained(
        folders["qwen3_moe"],
        device_budget="50%",
        policy="lfu",
        io_threads=2,
        direct_io=False,
        attn_implementation="eager",
        output_loading_info=True,
    )
    stats = moe_offload.get_offloader(model).stats()
    assert (stats["policy"], stats["io_mode"]) == ("lfu", "buffered")
    assert model.config._attn_implementation == "eager"
    assert info["missing_keys"] == set()
    with pytest.raises(TypeError, match="io_thread"):
        moe_offload.from_pretrained(folders["qwen3_moe"], io_thread=2)
    with pytest.raises(BudgetError, match="at least"):
        moe_offload.from_pretrained(folders["qwen3_moe"], device_budget=100)


def test_device_map_cpu_is_fine_and_others_are_refused(folders: dict[str, Path]) -> None:
    assert moe_offload.from_pretrained(folders["qwen3_moe"], device_map="cpu").device.type == "cpu"
    layers = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    spread = {**layers, "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    with pytest.raises(UnsupportedModelError, match=r"device_map places modules on .*disk"):
        moe_offload.from_pretrained(
            folders["qwen3_moe"], device_map=spread, offload_folder=folders["qwen3_moe"] / "o"
        )


def test_loading_leaves_transformers_unpatched(folders: dict[str, Path]) -> None:
    cls = transformers.Qwen3MoeForCausalLM
    before = {name: value for name, value in vars(cls).items() if not name.startswith("_can_set")}
    model = moe_offload.from_pretrained(folders["qwen3_moe"])
    after = {name: value for name, value in vars(cls).items() if not name.startswith("_can_set")}
    assert after == before
    assert type(model) is cls
    plain = AutoModelForCausalLM.from_pretrained(folders["qwen3_moe"])
    assert plain.model.layers[0].mlp.experts.gate_up_proj.device.type == "cpu"


# --- bad checkpoints ---------------------------------------------------------------------------


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders["qwen3_moe"], tmp_path / "model"))


def rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


EXPERT = "model.layers.1.mlp.experts.5.up_proj.weight"
DENSE = "model.layers.0.self_attn.q_proj.weight"


def flip_header_bit(folder: Path, at: int) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[at] ^= 4
    (folder / "model.safetensors").write_bytes(data)


def truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1000])


BAD_FOLDERS: dict[str, tuple[Any, str]] = {
    "no_config": (lambda f: (f / "config.json").unlink(), r"has no config.json"),
    "config_not_json": (lambda f: (f / "config.json").write_text("{oops"), r"config.json"),
    "no_weights": (lambda f: (f / "model.safetensors").unlink(), r"found none"),
    "truncated": (truncate, r"truncated"),
    "length_bit": (lambda f: flip_header_bit(f, 6), r"announce a header"),
    "header_bit": (lambda f: flip_header_bit(f, 40), r"model.safetensors"),
    "empty_file": (lambda f: (f / "model.safetensors").write_bytes(b""), r"at least 10 bytes"),
    "expert_missing": (lambda f: rewrite(f, lambda t: t.pop(EXPERT)), r"experts \[5\] are missing"),
    "dense_missing": (lambda f: rewrite(f, lambda t: t.pop(DENSE)), r"q_proj.weight"),
    "expert_shape": (
        lambda f: rewrite(f, lambda t: t.update({EXPERT: torch.zeros(3, 32)})),
        r"experts\.5\.up_proj",
    ),
    "all_expert_shapes": (
        lambda f: rewrite(
            f, lambda t: t.update({k: torch.zeros(3, 32) for k in t if "up_proj" in k})
        ),
        r"gate_up_proj must have shape \(32, 32\), but .* gives \(19, 32\)",
    ),
    "dense_shape": (
        lambda f: rewrite(f, lambda t: t.update({DENSE: torch.zeros(3, 32)})),
        r"q_proj.weight must have shape \(32, 32\), the checkpoint has \(3, 32\)",
    ),
    "more_experts_in_config": (
        lambda f: edit_config(f, num_local_experts=9),
        r"experts \[8\] are miss",
    ),
    "fewer_experts_in_config": (lambda f: edit_config(f, num_local_experts=7), r"found \[0, 1"),
    "more_layers_in_config": (lambda f: edit_config(f, num_hidden_layers=3), r"layers\.2"),
    "layer_experts_gone": (
        lambda f: rewrite(f, lambda t: [t.pop(k) for k in list(t) if "layers.1.mlp.experts" in k]),
        r"layers.1.mlp.experts",
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_checkpoint_is_one_clear_error(case: str, folder: Path) -> None:
    damage, expected = BAD_FOLDERS[case]
    damage(folder)
    with pytest.raises(CheckpointError, match=expected) as caught:
        moe_offload.from_pretrained(folder)
    message = str(caught.value)
    assert str(folder) in message
    assert "\n" not in message


def test_flipping_any_header_bit_never_gives_a_different_model(folder: Path) -> None:
    """Every 40th bit: an error, or exactly the same model (flips in metadata or white space)."""
    expected = logits(moe_offload.from_pretrained(folder))
    file = folder / "model.safetensors"
    good = file.read_bytes()
    end = 8 + int.from_bytes(good[:8], "little")
    for bit in range(0, end * 8, end * 8 // 40 | 1):
        flipped = bytearray(good)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        try:
            model = moe_offload.from_pretrained(folder)
        except CheckpointError:
            continue
        assert torch.equal(logits(model), expected), f"bit {bit}"


def test_missing_shard_is_named(tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        moe_offload.from_pretrained(tmp_path)


def test_pickled_checkpoint_is_refused_with_the_way_out(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin.*save_pretrained"):
        moe_offload.from_pretrained(folder)


def test_wrong_paths_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere: no such folder"):
        moe_offload.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"is a file; .* expects the folder"):
        moe_offload.from_pretrained(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"nobody/no-such-model"):
        moe_offload.from_pretrained("nobody/no-such-model")


def test_unsupported_architectures_are_named(tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model(
        "llama", vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM has no routed experts"):
        moe_offload.from_pretrained(tmp_path / "dense")
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown/config.json").write_text('{"model_type": "frobnicator"}')
    save_file({"a": torch.zeros(1)}, tmp_path / "unknown/model.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"frobnicator"):
        moe_offload.from_pretrained(tmp_path / "unknown")


def test_hub_ids_resolve_through_the_local_cache(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layout huggingface_hub keeps on disk, without any network."""
    commit = "0" * 40
    repo = tmp_path / "models--someone--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text(commit)
    shutil.copytree(folders["granitemoe"], repo / "snapshots" / commit)
    model = moe_offload.from_pretrained("someone/tiny", cache_dir=str(tmp_path))
    assert torch.equal(logits(model), logits(tiny_model("granitemoe")))


def test_families_have_distinct_layouts() -> None:
    """The fixtures above cover per-expert, fused, and biased transposed layouts."""
    assert len({family(name).sections for name in ("mixtral", "gpt_oss")}) == 2


def test_experts_that_cannot_be_read_one_by_one_are_refused(tmp_path: Path) -> None:
    """Ernie 4.5 VL's files number text and vision experts through, in lists of one kind."""
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
    text = {**sizes, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 128}
    text |= {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": [16, 16]}
    text |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    text["rope_parameters"] = rope
    vision = {"hidden_size": 32, "depth": 1, "num_heads": 2, "intermediate_size": 32}
    config = AutoConfig.for_model("ernie4_5_vl_moe", text_config=text, vision_config=vision)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"ErnieFuse\w+; expected one tensor per exp"):
        moe_offload.from_pretrained(tmp_path)
