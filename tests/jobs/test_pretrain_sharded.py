"""Stage 2 with its frozen language model in shards: half of it on each rank, and nothing else."""

import logging
import multiprocessing
import shutil
import socket
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from training_jobs import CPU, alone, job, records, write_corpus

from jobs.checkpoint import Checkpoints
from jobs.errors import UserError
from jobs.pretrain import train
from jobs.training.context import TrainContext
from jobs.training.data import on_device
from jobs.training.exports import read_card
from jobs.training.session import open_session
from jobs.training.shard import check_sharding, shard_llm
from model.llm import LlmDecodingConfig
from model.llm_text import PaddedText, PrefixText
from model.presets import BLIP2_PRESETS, LlmPreset

SHORT = {"num_steps": 4}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A root in which there is what stage 2 begins from."""
    root = tmp_path_factory.mktemp("begun") / "corpus"
    write_corpus(root)
    for stage in ("med", "stage1"):
        alone(job(root, stage, {"num_steps": 1, "warmup_steps": 0}))
    return root


def one_step(this, context):
    """Return the losses, the gradients and the local share of the LLM of a first step."""
    with ExitStack() as stack:
        session = open_session(this, context, stack)
        model = session.built.objective.model
        parameters = list(model.llm.parameters())
        local = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
        share = sum(p.numel() for p in local) / sum(p.numel() for p in parameters)
        batch = on_device(session.loader, next(session.loader), session.built.objective, CPU)
        losses = session.stepper.update(0, [batch], session.pieces)
        found = {f"loss.{name}": value for name, value in losses.items()}
        found |= {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert all(p.grad is None for p in model.llm.parameters())
    return found | {"share": torch.tensor(share)}


def losses_of_a_t5(context, is_sharded):
    """Return the loss, a gradient and a generated text of a stage 2 around an encoder-decoder."""
    torch.manual_seed(0)
    preset, t5 = BLIP2_PRESETS["tiny"], BLIP2_PRESETS["blip2-flan-t5-xl"].llm.config
    sizes = {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2}
    small = type(t5)(**(t5.to_dict() | sizes | {"num_heads": 4, "num_decoder_layers": 2}))
    llm = LlmPreset(name=None, dtype=torch.float32, config=small, has_own_head=True).build()
    model = preset.build_stage2(llm).eval()
    assert not is_sharded or shard_llm(model, context)
    ids = torch.randint(3, 128, (2, 5))
    text = PaddedText(ids, torch.ones_like(ids, dtype=torch.bool))
    pixels = torch.randn(2, 3, 32, 32)
    loss = model(pixels, PrefixText(text, text)).loss
    loss.backward()
    options = {"stop_id": 1, "pad_id": 0}
    config = LlmDecodingConfig(num_beams=1, max_new_tokens=4)
    written = llm.generate(model.soft_prompt(pixels), ids, text.is_real, config, **options)
    return {"loss": loss.detach(), "grad": model.projection.weight.grad, "written": written}


def as_rank(rank, port, whole, sharded, out):
    """Take one step with and without shards, then train to the end in shards."""
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    context = TrainContext(CPU, rank, 2)
    for name, this in (("whole", whole), ("sharded", sharded)):
        found = {n: t.contiguous() for n, t in one_step(this, context).items()}
        save_file(found, f"{out}/{name}-{rank}.safetensors")
    train(context, whole)
    assert train(context, sharded, should_stop=lambda: True) is None  # after the first record
    train(context, sharded)
    of_a_t5 = {f"{is_sharded}": losses_of_a_t5(context, is_sharded) for is_sharded in (False, True)}
    torch.testing.assert_close(of_a_t5["True"], of_a_t5["False"], atol=1e-5, rtol=1e-5)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(begun, tmp_path_factory):
    """Return the folder of two trainings by two ranks, and their jobs: whole, and in shards."""
    out = tmp_path_factory.mktemp("both")
    jobs = []
    for name in ("whole", "sharded"):
        shutil.copytree(begun, out / name)
        options = SHORT | {"shards_llm": name == "sharded"}
        jobs.append(job(out / name, "stage2", options, checkpoints_activations=True))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = multiprocessing.get_context("spawn")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", ":".join([str(Path(__file__).parent), *sys.path]))
        ranks = [
            processes.Process(target=as_rank, args=(rank, port, *jobs, out)) for rank in (0, 1)
        ]
        for rank in ranks:
            rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0]
    return out, *jobs


@pytest.mark.parametrize("rank", [0, 1])
def test_losses_and_gradients_are_those_of_the_whole_model(both, rank):
    whole, sharded = (load_file(both[0] / f"{n}-{rank}.safetensors") for n in ("whole", "sharded"))
    assert whole.pop("share") == 1.0
    assert 0.45 < sharded.pop("share") < 0.55
    assert any(name.startswith("qformer") for name in whole)
    torch.testing.assert_close(sharded, whole, atol=1e-5, rtol=1e-5)


def test_a_whole_training_in_shards_ends_with_the_same_records_checkpoint_and_export(both):
    _, whole, sharded = both
    for one, other in zip(records(sharded), records(whole), strict=True):
        flat = [row | row.get("probe", {}) for row in (one, other)]
        names = {name for name, value in flat[1].items() if isinstance(value, float)}
        assert {n: flat[0][n] for n in names} == pytest.approx(
            {n: flat[1][n] for n in names}, abs=1e-5
        )
    ours, theirs = (
        Checkpoints(each.open_store(), f"{each.folder}/checkpoints").latest()
        for each in (sharded, whole)
    )
    assert ours.frozen == theirs.frozen
    assert ours.content == theirs.content
    assert ours.files["model"].bytes == theirs.files["model"].bytes
    exports = [
        load_file(f"{each.root}/train/stage2/export/model.safetensors") for each in (sharded, whole)
    ]
    torch.testing.assert_close(*exports, atol=1e-5, rtol=1e-5)
    llm = [name for name in exports[1] if "language_model" in name]
    assert llm
    assert all(torch.equal(exports[0][name], exports[1][name]) for name in llm)
    cards = [read_card(each.open_store(), "stage2") for each in (sharded, whole)]
    assert cards[0].files.keys() == cards[1].files.keys()


def test_alone_a_worker_has_it_all_and_says_so(caplog):
    model = BLIP2_PRESETS["tiny"].build_stage2()
    with caplog.at_level(logging.INFO):
        assert shard_llm(model, TrainContext(CPU)) is False
    assert "shards_llm has no effect on one worker" in caplog.text
    assert not any(isinstance(p, DTensor) for p in model.parameters())


def test_what_cannot_be_sharded_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(UserError, match="only stage2 has a language model"):
        check_sharding(job(tmp_path, "med", {"shards_llm": True}))
    with pytest.raises(UserError, match="a model in shards is not compiled"):
        check_sharding(job(tmp_path, "stage2", {"shards_llm": True}, is_compiled=True))
