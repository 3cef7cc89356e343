"""MED on two real gloo processes: one queue, negatives across ranks, no hanging on uneven ranks."""

import os
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from med_golden import OBJECTIVES, batch, reference_model
from torch.nn.parallel import DistributedDataParallel

from model.losses import Negatives
from model.med_pretraining import FILTER_FINE_TUNING, MedStep

HERE = Path(__file__)
WORLD = 2
FINE_TUNING = replace(FILTER_FINE_TUNING, joint_width=16, queue_size=24)
EXACT = {"atol": 1e-10, "rtol": 1e-9}  # in float64
STEP = MedStep(alpha=0.4)

# Across ranks and within, some rows twice; rows 0..2 are rank 0's.
NEGATIVES = Negatives(torch.tensor([1, 4, 4, 0, 1, 2]), torch.tensor([4, 0, 5, 1, 0, 1]))
IMAGE_IDS = torch.tensor([4, 7, 9, 9, -1, 4])


def model_of(objectives):
    """The reference's weights in float64."""
    return reference_model(objectives).double().train()


def inputs_of(rows):
    pixels, *rest = batch(image_ids=IMAGE_IDS)
    return [pixels.double()[rows], *(values[rows] for values in rest)]


def grads_of(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def task_fine_tune(rank):
    rows = slice(3 * rank, 3 * rank + 3)
    own = Negatives(NEGATIVES.image_for_text[rows], NEGATIVES.text_for_image[rows])
    model = model_of(FINE_TUNING)
    # The queue is equal everywhere by itself; at its real size it would be slow to broadcast.
    parallel = DistributedDataParallel(model, broadcast_buffers=False)
    losses = parallel(*inputs_of(rows), STEP, own)
    (losses.itm + 0 * losses.total).backward()  # ranks wait for a gradient of every parameter
    saved = {f"grad.{name}": grad for name, grad in grads_of(model).items()}
    saved |= {f"queue.{name}": tensor.clone() for name, tensor in model.queue.named_buffers()}
    saved |= {"itm": losses.itm.detach(), "itm_logits": losses.itm_logits.detach()}
    with torch.no_grad():
        drawn = [model(*inputs_of(rows), STEP).negatives for _ in range(20)]
    saved["image_for_text"] = torch.stack([negatives.image_for_text for negatives in drawn])
    saved["text_for_image"] = torch.stack([negatives.text_for_image for negatives in drawn])
    return saved


def task_pretrain(rank):
    rows = slice(3 * rank, 3 * rank + 3)
    model = model_of(OBJECTIVES)
    with torch.no_grad():
        for number in range(2):
            model(*inputs_of(rows), MedStep(alpha=0.4, micro_batch=number, num_micro_batches=2))
        drawn = [model(*inputs_of(rows), STEP).negatives.image_for_text for _ in range(5)]
    saved = {f"queue.{name}": tensor for name, tensor in model.queue.named_buffers()}
    return saved | {"image_for_text": torch.stack(drawn)}


def task_uneven(rank):
    model = model_of(OBJECTIVES)
    try:
        model(*inputs_of(slice(0, 3 + rank)), STEP)
    except ValueError as error:
        return {"message": torch.tensor(list(str(error).encode()))}
    return {}


def run_two(folder):
    """Run every task of this file in two processes; return what each one saved."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    running = [
        subprocess.Popen(
            [sys.executable, str(HERE), str(rank), str(folder)],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    for rank, process in enumerate(running):
        assert process.returncode == 0, f"rank {rank}:\n{errors[rank]}"
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_two(tmp_path_factory.mktemp("ranks"))


def of_task(ranks, task):
    return [
        {name.removeprefix(f"{task}/"): t for name, t in rank.items() if name.startswith(task)}
        for rank in ranks
    ]


@pytest.fixture(scope="module")
def joined():
    """One process with all six pairs."""
    model = model_of(FINE_TUNING)
    losses = model(*inputs_of(slice(None)), STEP, NEGATIVES)
    losses.itm.backward()
    return model, losses


def test_matching_logits_of_two_ranks_are_those_of_the_joined_batch(ranks, joined):
    parts = [rank["itm_logits"].view(3, 3, 2) for rank in of_task(ranks, "fine_tune")]
    both = torch.cat(parts, dim=1).flatten(0, 1)  # kind, pair
    torch.testing.assert_close(both, joined[1].itm_logits.detach(), **EXACT)


def test_data_parallel_matching_gradients_are_those_of_the_joined_batch(ranks, joined):
    expected = grads_of(joined[0])
    for saved in of_task(ranks, "fine_tune"):
        for name, grad in expected.items():
            torch.testing.assert_close(
                saved[f"grad.{name}"], grad, **EXACT, msg=lambda text, n=name: f"{n}: {text}"
            )
    assert expected["image_encoder.cls_token"].norm() > 1e-3


@pytest.mark.parametrize("task", ["fine_tune", "pretrain"])
def test_both_ranks_hold_the_same_queue(ranks, task):
    one, other = of_task(ranks, task)
    names = [name for name in one if name.startswith("queue.")]
    assert len(names) == 4
    assert all(torch.equal(one[name], other[name]) for name in names)


def test_the_queue_holds_what_the_joined_batch_would_leave(ranks, joined):
    held = of_task(ranks, "fine_tune")[0]
    queue = joined[0].queue
    assert torch.equal(held["queue.pointer"], queue.pointer)
    assert torch.equal(held["queue.image_ids"], queue.image_ids)
    torch.testing.assert_close(held["queue.image_feats"], queue.image_feats, **EXACT)
    torch.testing.assert_close(held["queue.text_feats"], queue.text_feats, **EXACT)


def test_accumulated_micro_batches_of_all_ranks_enter_the_queue_together(ranks):
    held = of_task(ranks, "pretrain")[0]
    assert held["queue.image_ids"][0, :12].tolist() == [*IMAGE_IDS.tolist()] * 2


def test_negatives_come_from_all_ranks_and_never_from_the_own_image(ranks):
    drawn = set()
    for rank, saved in enumerate(of_task(ranks, "fine_tune")):
        for name in ("image_for_text", "text_for_image"):
            drawn |= {(3 * rank + i, j) for row in saved[name].tolist() for i, j in enumerate(row)}
    assert any(i < 3 <= j for i, j in drawn)
    assert any(j < 3 <= i for i, j in drawn)
    same = {(i, i) for i in range(6)} | {(0, 5), (5, 0), (2, 3), (3, 2)}
    assert drawn & same == set()


def test_pretrainings_negatives_are_numbered_within_the_rank(ranks):
    assert all(saved["image_for_text"].max() < 3 for saved in of_task(ranks, "pretrain"))


def test_uneven_ranks_are_an_error_on_every_rank_instead_of_hanging(ranks):  # D5
    for saved in of_task(ranks, "uneven"):
        message = bytes(saved["message"].tolist()).decode()
        assert "batch size differs between ranks: [3, 4]" in message


def main(rank, folder):
    """One rank's process."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=int(rank),
        world_size=WORLD,
        timeout=timedelta(seconds=60),
    )
    tasks = {"fine_tune": task_fine_tune, "pretrain": task_pretrain, "uneven": task_uneven}
    saved = {
        f"{name}/{key}": tensor
        for name, run in tasks.items()
        for key, tensor in run(int(rank)).items()
    }
    torch.save(saved, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
