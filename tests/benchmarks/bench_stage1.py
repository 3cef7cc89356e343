"""A stage-1 training step against the same computation put together from transformers' modules.

    python tests/benchmarks/bench_stage1.py [--layers 12] [--batch 4] [--threads 2]

Both sides do forward and backward of ITC, ITM and ITG on the output of a frozen ViT-g, (B, 257,
1408), at BERT-base width, from the same weights and, with dropout off, to the same losses, which is
checked first. The peer is what one writes with `Blip2QFormerModel`: a pass of the queries and one
of the text for ITC, one over 3B pairs with their images repeated for ITM, and one of queries and
text under a 4-D additive mask for ITG. Rounds alternate between the sides and medians are compared.
Peak memory is what a step adds (gradients and activations; the weights are there before): to the
resident size of a process of its own for each side on the CPU, to the allocator's with CUDA. With
CUDA it runs under bf16 autocast and torch.compile at batch 100, and prints model FLOP/s over the
device's peak and the share of each part.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Blip2QFormerConfig, Blip2QFormerModel
from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings

from model import losses
from model.bert import LanguageHead
from model.losses import Negatives
from model.masks import Objective, self_attention_mask
from model.names.blip2 import STAGE1_TRANSFORMERS
from model.names.rename import to_theirs
from model.qformer import QFormerConfig
from model.stage1 import Stage1, Stage1Config

TEXT_LENGTH, IMAGE_TOKENS, IMAGE_WIDTH = 32, 257, 1408
# Dense bf16 tensor-core peaks from the vendor's data sheets, by part of the device's name.
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0}


@dataclass(frozen=True)
class Batch:
    """Frozen image features and captions of 8 to 32 tokens, padded to 32."""

    image: torch.Tensor
    token_ids: torch.Tensor
    text_is_real: torch.Tensor
    image_ids: torch.Tensor


class Peer(nn.Module):
    """Stage 1 from transformers' modules, plain passes only."""

    def __init__(self, config: Stage1Config) -> None:
        super().__init__()
        sizes = config.qformer
        theirs = Blip2QFormerConfig(
            vocab_size=sizes.vocab_size,
            hidden_size=sizes.width,
            num_hidden_layers=sizes.num_layers,
            num_attention_heads=sizes.num_heads,
            intermediate_size=sizes.ffn_width,
            max_position_embeddings=sizes.max_positions,
            hidden_dropout_prob=sizes.dropout,
            attention_probs_dropout_prob=sizes.dropout,
            encoder_hidden_size=sizes.image_width,
            use_qformer_text_input=True,
        )
        self.config = config
        self.ln_vision = nn.LayerNorm(sizes.image_width, eps=1e-5)
        self.query_tokens = nn.Parameter(torch.empty(1, sizes.num_queries, sizes.width))
        self.embeddings = Blip2TextEmbeddings(theirs)
        self.qformer = Blip2QFormerModel._from_config(theirs, attn_implementation="sdpa")
        self.language_head = LanguageHead(sizes)  # transformers has none for the Q-Former
        self.vision_projection = nn.Linear(sizes.width, config.joint_width)
        self.text_projection = nn.Linear(sizes.width, config.joint_width)
        self.itm_head = nn.Linear(sizes.width, 2)
        self.temperature = nn.Parameter(torch.tensor(config.temperature))

    def load_ours(self, ours: Stage1) -> None:
        """Take over our weights, so that both sides compute the same numbers."""
        state = {}
        for name, value in ours.state_dict().items():
            renamed = to_theirs(name, STAGE1_TRANSFORMERS)
            state[renamed or name.replace("qformer.language_head", "language_head")] = value
        for kind in ("weight", "bias"):
            state[f"ln_vision.{kind}"] = state.pop(f"vision_model.post_layernorm.{kind}")
        self.load_state_dict(state)

    def forward(self, batch: Batch, negatives: Negatives | None = None) -> torch.Tensor:
        """Return the three losses, (3,)."""
        image = self.ln_vision(batch.image.float()).to(batch.image.dtype)
        queries = self.query_tokens.expand(image.shape[0], -1, -1)
        is_real = batch.text_is_real
        embeds = self._run(queries, None, image)
        first = self._run(self.embeddings(batch.token_ids), is_real.long(), None, queries=0)[:, 0]
        itc, negatives = self._contrast(embeds, first, batch.image_ids, negatives)
        itm = self._match(image, batch, negatives)
        return torch.stack((itc, itm, self._caption(image, queries, batch)))

    def _run(
        self,
        states: torch.Tensor,
        mask: torch.Tensor | None,
        image: torch.Tensor | None,
        queries: int | None = None,
    ) -> torch.Tensor:
        output = self.qformer(
            query_embeds=states,
            query_length=queries,
            attention_mask=mask,
            encoder_hidden_states=image,
        )
        return output.last_hidden_state

    def _contrast(
        self,
        embeds: torch.Tensor,
        first: torch.Tensor,
        image_ids: torch.Tensor,
        negatives: Negatives | None,
    ) -> tuple[torch.Tensor, Negatives]:
        image = F.normalize(self.vision_projection(embeds).float(), dim=-1)
        text = F.normalize(self.text_projection(first).float(), dim=-1)
        i2t = losses.query_similarity(image, text.detach()) / self.temperature
        t2i = losses.query_similarity(image.detach(), text).t() / self.temperature
        same = losses.same_image(image_ids, image_ids, 0)
        if negatives is None:
            weights = [losses.negative_weights(sim, same) for sim in (t2i, i2t)]
            negatives = Negatives(*(losses.draw(w) for w in weights))
        loss = (losses.contrastive_loss(i2t, same) + losses.contrastive_loss(t2i, same)) / 2
        return loss, negatives

    def _match(self, image: torch.Tensor, batch: Batch, negatives: Negatives) -> torch.Tensor:
        ids, is_real = batch.token_ids, batch.text_is_real
        size, drawn = len(ids), negatives.text_for_image
        texts = torch.cat((ids, ids, ids[drawn]))
        reals = torch.cat((is_real, is_real, is_real[drawn]))
        images = torch.cat((image, image[negatives.image_for_text], image))
        queries = self.query_tokens.expand(3 * size, -1, -1)
        num_queries = queries.shape[1]
        states = self._run(
            self.embeddings(texts, query_embeds=queries),
            F.pad(reals, (num_queries, 0), value=True).long(),
            images,
            num_queries,
        )
        logits = self.itm_head(states[:, :num_queries]).mean(dim=1)
        is_match = torch.arange(3 * size, device=ids.device) < size
        return F.cross_entropy(logits.float(), is_match.long())

    def _caption(self, image: torch.Tensor, queries: torch.Tensor, batch: Batch) -> torch.Tensor:
        ids = batch.token_ids.clone()
        ids[:, 0] = self.config.caption_start_id
        num_queries = queries.shape[1]
        allowed = self_attention_mask(Objective.ITG, num_queries, batch.text_is_real)[:, None]
        # A 4-D boolean mask is silently wrong under eager attention: additive it is.
        mask = torch.zeros(allowed.shape, device=ids.device).masked_fill(~allowed, -1e4)
        states = self._run(self.embeddings(ids, query_embeds=queries), mask, image, num_queries)
        words = self.embeddings.word_embeddings.weight
        logits = self.language_head(states[:, num_queries:-1], words)
        return losses.label_smoothed(logits, losses.next_token_targets(ids, batch.text_is_real))


def make_batch(size: int, device: str, dtype: torch.dtype) -> Batch:
    """Return random features and captions, the same for every call."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(8, TEXT_LENGTH + 1, (size, 1), generator=generator)
    is_real = torch.arange(TEXT_LENGTH) < lengths
    ids = torch.randint(1000, 30000, (size, TEXT_LENGTH), generator=generator) * is_real
    image = torch.randn(size, IMAGE_TOKENS, IMAGE_WIDTH, generator=generator)
    return Batch(
        image.to(device, dtype), ids.to(device), is_real.to(device), torch.arange(size).to(device)
    )


def run_ours(model: Stage1, batch: Batch, negatives: Negatives | None = None) -> torch.Tensor:
    """Return our three losses, (3,)."""
    output = model(batch.image, batch.token_ids, batch.text_is_real, batch.image_ids, negatives)
    return torch.stack((output.itc, output.itm, output.itg))


def build(args: argparse.Namespace, dropout: float) -> tuple[Stage1, Peer]:
    """Return both sides with the same weights."""
    torch.manual_seed(0)
    config = Stage1Config(qformer=QFormerConfig(num_layers=args.layers, dropout=dropout))
    with torch.device(args.device):
        ours, peer = Stage1(config, nn.Identity()), Peer(config)
    peer.load_ours(ours)
    return ours, peer


def check_equal(args: argparse.Namespace) -> None:
    """Stop unless both sides compute the same losses, in float32 without dropout."""
    ours, peer = build(args, dropout=0.0)
    batch = make_batch(2, args.device, torch.float32)
    other = torch.tensor([1, 0], device=args.device)
    with torch.no_grad():
        values = run_ours(ours, batch, Negatives(other, other))
        expected = peer(batch, Negatives(other, other))
    torch.testing.assert_close(values, expected, atol=1e-4, rtol=1e-4)


Step = Callable[[], None]


def training_step(model: nn.Module, run: Callable[[], torch.Tensor], device: str) -> Step:
    """Return forward and backward of the summed losses; its gradients are dropped at the end."""

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            total = run().sum()
        total.backward()
        model.zero_grad(set_to_none=True)

    return step


def steps_of(args: argparse.Namespace, batch: Batch) -> dict[str, Step]:
    """Return a training step for either side."""
    ours, peer = build(args, args.dropout)
    run, run_peer = run_ours, Peer.__call__
    if args.compile:
        run = torch.compile(run_ours, fullgraph=True)
        run_peer = torch.compile(Peer.__call__)
    return {
        "ours": training_step(ours, lambda: run(ours, batch), args.device),
        "peer": training_step(peer, lambda: run_peer(peer, batch), args.device),
    }


def seconds(step: Step, device: str) -> float:
    """Return how long one call takes, the device's work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare_speed(steps: dict[str, Step], args: argparse.Namespace) -> dict[str, float]:
    """Return each side's median seconds over alternating rounds, after warm-up."""
    for step in steps.values():
        for _ in range(args.warmup):
            step()
    taken: dict[str, list[float]] = {side: [] for side in steps}
    for _ in range(args.repeats):
        for side, step in steps.items():
            taken[side].append(seconds(step, args.device))
    return {side: statistics.median(values) for side, values in taken.items()}


def kernel_mib(field: str) -> float:
    """Return VmRSS or VmHWM, its peak, of this process as Linux counts them."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if field in line)


def report_memory(args: argparse.Namespace) -> None:
    """Print how many MiB one side's step adds at its peak, in a process of its own."""
    batch = make_batch(args.batch, args.device, args.dtype)
    step = steps_of(args, batch)[args.memory_of]
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before = kernel_mib("VmRSS")
    step()
    print(json.dumps({"mib": kernel_mib("VmHWM") - before}))


def cpu_memory(side: str, args: argparse.Namespace) -> float:
    """Measure `report_memory` of one side; NaN where the system is not Linux."""
    if not Path("/proc/self/clear_refs").exists():
        return math.nan
    options = ["--batch", args.batch, "--layers", args.layers, "--dropout", args.dropout]
    options += ["--threads", args.threads]
    command = [sys.executable, __file__, "--device", "cpu", "--memory-of", side, *map(str, options)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(json.loads(output.splitlines()[-1])["mib"])


def cuda_memory(step: Step) -> float:
    """Return how many MiB one step adds to the allocator at its peak."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def count_flops(args: argparse.Namespace) -> float:
    """Return the floating point operations of our forward and backward, counted by operator."""
    ours, _ = build(args, args.dropout)
    batch = make_batch(args.batch, args.device, args.dtype)
    with FlopCounterMode(display=False) as counter:
        training_step(ours, lambda: run_ours(ours, batch), args.device)()
    return float(counter.get_total_flops())


def parts_of(model: Stage1, batch: Batch) -> dict[str, Callable[[], torch.Tensor]]:
    """Return the parts of a step by themselves, each of which gives a scalar to differentiate."""
    qformer, ids, is_real = model.qformer, batch.token_ids, batch.text_is_real
    with torch.no_grad():
        image = model.encode_image(batch.image)
        seen = qformer.project_image(image)
        cached = qformer.encode_image(seen).layers
    three, groups = [rows.repeat(3, 1) for rows in (ids, is_real)], [seen.shared_by(2), seen]

    def scalar(states: torch.Tensor) -> torch.Tensor:
        # A plain sum of normalised states is a constant: its gradients would be denormal noise.
        return (states * states.detach().roll(1, 0)).float().sum()

    def captions() -> torch.Tensor:
        states = qformer.decode(ids, is_real, cached)
        logits = qformer.next_token_logits(states[:, :-1])
        return losses.label_smoothed(logits, losses.next_token_targets(ids, is_real))

    def projections() -> torch.Tensor:
        layers = qformer.project_image(model.encode_image(batch.image)).layers
        return torch.stack([scalar(part) for pair in layers if pair for part in pair]).sum()

    return {
        "image keys and values": projections,
        "query pass": lambda: scalar(qformer.encode_image(seen).embeds),
        "text pass": lambda: scalar(qformer.encode_text(ids, is_real, first_only=True)),
        "matching pass (3B)": lambda: scalar(qformer.encode_pair(*three, groups)),
        "captioning pass": captions,
    }


def measure_parts(args: argparse.Namespace) -> dict[str, float]:
    """Return the seconds of each part's forward and backward on its own."""
    model, _ = build(args, args.dropout)
    taken = {}
    batch = make_batch(args.batch, args.device, args.dtype)
    with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
        parts = parts_of(model, batch)
    for name, part in parts.items():
        run = torch.compile(part) if args.compile else part
        step = training_step(model, run, args.device)
        for _ in range(args.warmup):
            step()
        taken[name] = statistics.median(seconds(step, args.device) for _ in range(args.repeats))
    return taken


def parse() -> argparse.Namespace:
    """Return the options, with defaults that suit the device."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    has_cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if has_cuda else "cpu")
    parser.add_argument("--layers", type=int, help="12 with CUDA, else 4")
    parser.add_argument("--batch", type=int, help="100 with CUDA, else 4")
    parser.add_argument("--repeats", type=int, help="20 with CUDA, else 5")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=1, help="on a busy machine, one is steadier")
    parser.add_argument("--parts", action="store_true", help="time each part (always with CUDA)")
    parser.add_argument("--no-compile", action="store_true", help="with CUDA, run eagerly")
    parser.add_argument("--peak-tflops", type=float, help="of the device, for MFU")
    parser.add_argument("--memory-of", choices=["ours", "peer"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    on_cuda = args.device == "cuda"
    args.layers = args.layers or (12 if on_cuda else 4)
    args.batch = args.batch or (100 if on_cuda else 4)
    args.repeats = args.repeats or (20 if on_cuda else 5)
    args.warmup = 5 if on_cuda else 1
    args.compile = on_cuda and not args.no_compile
    args.dtype = torch.bfloat16 if on_cuda else torch.float32
    return args


def print_mfu(args: argparse.Namespace, step_seconds: float) -> None:
    """Print the FLOPs of our step and what share of the device's peak it reaches."""
    flops = count_flops(args)
    name = torch.cuda.get_device_name()
    peak = args.peak_tflops or next((v for k, v in PEAK_TFLOPS.items() if k in name), None)
    reached = flops / step_seconds / 1e12
    mfu = f"{reached / peak:.1%} of {peak:.0f}" if peak else "peak unknown: pass --peak-tflops"
    print(f"{name}: {flops / 1e12:.2f} TFLOP a step, {reached:.0f} TFLOP/s, {mfu}")


def main() -> None:
    """Compare and print a table; the last line is JSON."""
    args = parse()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        report_memory(args)
        return
    check_equal(args)
    steps = steps_of(args, make_batch(args.batch, args.device, args.dtype))
    taken = compare_speed(steps, args)
    on_cuda = args.device == "cuda"
    memory = {s: cuda_memory(steps[s]) if on_cuda else cpu_memory(s, args) for s in steps}
    print(f"stage-1 step, {args.device}, {args.layers} layers, batch {args.batch}, "
          f"{args.threads} threads, dropout {args.dropout}")  # fmt: skip
    print(f"{'':6}{'s/step':>10}{'samples/s':>12}{'peak MiB':>12}")
    for side, each in taken.items():
        print(f"{side:6}{each:10.3f}{args.batch / each:12.2f}{memory[side]:12.0f}")
    if on_cuda:
        print_mfu(args, taken["ours"])
    if on_cuda or args.parts:
        parts = measure_parts(args)
        for name, part in parts.items():
            print(f"{name:24}{part:8.3f} s  {part / sum(parts.values()):6.1%}")
    speed = {side: round(args.batch / each, 3) for side, each in taken.items()}
    ratio = round(taken["peer"] / taken["ours"], 3)
    print(json.dumps({"name": "stage1_step", **speed, "ratio": ratio, "unit": "samples/s"}))


if __name__ == "__main__":
    main()
