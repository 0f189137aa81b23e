"""Trains the tiny Qwen3-MoE model of the demonstrations on two CPU cores in about an hour.

The run is bounded by wall time, not by steps: learning rates follow a cosine of the elapsed share
of --minutes, so a slower or busier machine ends with a finished model that has seen less text. The
result is an ordinary hub checkpoint. Routing is watched while training (`log.jsonl`), because it
is a target of the run as much as loss is.

    export MALLOC_ARENA_MAX=1 MALLOC_MMAP_THRESHOLD_=8000000000 MALLOC_TRIM_THRESHOLD_=8000000000
    python bench/tiny_moe/train.py --minutes 60 --run RUN
    python bench/tiny_moe/evaluate.py --run RUN

The malloc settings keep freed activations inside the process; without them each step faults them
in again.
"""

import argparse
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from data import Domain, MixedBatches, load_corpus
from fast_forward import forward, rope_table, token_loss, working_copy
from muon import Muon
from routing import balance_loss, popularity, routing_report, smoothness_loss
from tokenizers import Tokenizer
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

REPO = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Recipe:
    """Everything that shapes the result except the wall time."""

    seed: int = 1
    tokens_per_step: int = 4096
    seq_len: int = 256
    late_seq_len: int = 512  # so that positions beyond 256 are not new at generation time
    late_start: float = 0.8  # share of the time budget
    muon_lr: float = 0.02
    adam_lr: float = 3e-3
    warmup: float = 0.015
    final_lr: float = 0.02  # share of the peak
    balance: float = 0.02
    smoothness: float = 0.02  # without it next-token reuse stays at 1.47 times chance
    smooth_start: float = 0.16  # by then the routers know the domains


def model_config(vocab_size: int, top_k: int = 4, inner: int = 64) -> Qwen3MoeConfig:
    """As packaged 11.2 million parameters, 22.4 MB in bf16; 2.9 million work on each token.

    A single expert is multiplied by its probability as it is, as in the Switch Transformer:
    normalised, it would be 1 whatever the router says, and no gradient would reach the router.
    """
    return Qwen3MoeConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=32,
        num_experts_per_tok=top_k,
        moe_intermediate_size=inner,
        intermediate_size=inner,  # no dense layer uses it
        decoder_sparse_step=1,
        mlp_only_layers=[],
        norm_topk_prob=top_k > 1,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )


def lr_factor(progress: float, recipe: Recipe) -> float:
    if progress < recipe.warmup:
        return progress / recipe.warmup
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return recipe.final_lr + (1 - recipe.final_lr) * cosine


@torch.no_grad()
def quick_eval(
    w: dict[str, Tensor],
    config: Qwen3MoeConfig,
    domains: list[Domain],
    rows: int = 16,
) -> tuple[dict[str, float], dict]:
    """Held-out loss per domain and the routing report, on the first windows of 256 tokens."""
    rope, losses, ids = rope_table(config, 256), {}, {}
    for domain in domains:
        count = min(rows, (len(domain.held_out) - 1) // 256)
        text = domain.held_out[: count * 256 + 1]
        hidden, routing = forward(w, config, text[:-1].view(count, 256), rope)
        losses[domain.name] = token_loss(w, hidden, text[1:].view(count, 256)).item()
        ids[domain.name] = torch.stack([layer.ids for layer in routing])
    return losses, routing_report(ids, config.num_experts)


class Trainer:
    """Owns the parameters and both optimisers; `save` writes what a restart needs."""

    def __init__(self, config: Qwen3MoeConfig, recipe: Recipe, threads: int):
        self.config, self.recipe, self.threads = config, recipe, threads
        # Each worker computes a part of the batch on one core. Threads inside an operation would
        # wait for each other at every operation: with one busy neighbour on the two cores that was
        # ten times slower, while workers that meet once per step lose only what was taken.
        torch.set_num_threads(1)
        self.pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
        self.model = Qwen3MoeForCausalLM(config).float()
        self.params = {n: p.data for n, p in self.model.named_parameters()}
        inner = {
            n: p
            for n, p in self.params.items()
            if p.ndim >= 2 and "embed_tokens" not in n and not n.endswith("mlp.gate.weight")
        }
        names = list(inner)
        self.muons = [Muon({n: inner[n] for n in names[i::threads]}) for i in range(threads)]
        shape = (config.num_hidden_layers, config.num_experts)
        self.share = torch.full(shape, 1 / config.num_experts)  # running mean over recent steps
        self.rest = {n: torch.nn.Parameter(p) for n, p in self.params.items() if n not in inner}
        self.adam = torch.optim.Adam(self.rest.values(), recipe.adam_lr, (0.9, 0.95), fused=True)
        self.ropes = {n: rope_table(config, n) for n in (recipe.seq_len, recipe.late_seq_len)}

    def step(self, batch: Tensor, progress: float) -> dict[str, float]:
        """batch [B, S + 1]; returns the parts of the loss."""
        w = working_copy(self.params)
        results = list(
            self.pool.map(
                lambda i: self._gradients(w, batch[i :: self.threads], progress),
                range(self.threads),
            )
        )
        grads = {n: sum(g[n] for g, _, _ in results) / self.threads for n in w}
        self.share.lerp_(torch.stack([share for _, share, _ in results]).mean(0), 0.2)
        factor = lr_factor(progress, self.recipe)
        lr = self.recipe.muon_lr * factor
        list(self.pool.map(lambda muon: muon.step(grads, lr), self.muons))
        for name, param in self.rest.items():
            param.grad = grads[name].float()
        self.adam.param_groups[0]["lr"] = self.recipe.adam_lr * factor
        self.adam.step()
        parts = [p for _, _, p in results]
        return {key: sum(p[key] for p in parts) / self.threads for key in parts[0]}

    def _gradients(
        self, shared: dict[str, Tensor], batch: Tensor, progress: float
    ) -> tuple[dict[str, Tensor], Tensor, dict[str, float]]:
        """One worker's part: gradients, expert shares [L, E], parts of the loss."""
        w = {n: t.detach().requires_grad_() for n, t in shared.items()}
        rope = self.ropes[batch.shape[1] - 1]
        hidden, routing = forward(w, self.config, batch[:, :-1], rope)
        loss = token_loss(w, hidden, batch[:, 1:])
        pairs = zip(routing, self.share, strict=True)
        balance = torch.stack([balance_loss(r.probs, share) for r, share in pairs]).mean()
        smooth = torch.stack([smoothness_loss(r.probs) for r in routing]).mean()
        smoothness = self.recipe.smoothness if progress >= self.recipe.smooth_start else 0.0
        (loss + self.recipe.balance * balance + smoothness * smooth).backward()
        share = popularity(torch.stack([r.ids for r in routing]), self.config.num_experts)
        parts = {"loss": loss.item(), "balance": balance.item(), "smoothness": smooth.item()}
        return {n: t.grad for n, t in w.items()}, share, parts

    def save(self, run: Path, done: dict) -> None:
        """The fp32 state (written aside first, against a crash) and the bf16 hub folder."""
        state = {
            "params": self.params,
            "muon": {n: b for muon in self.muons for n, b in muon.buffers.items()},
            "adam": self.adam.state_dict(),
            "done": done,
        }
        torch.save(state, run / "state.tmp")
        (run / "state.tmp").replace(run / "state.pt")
        hub = Qwen3MoeForCausalLM(self.config).to(torch.bfloat16)
        hub.load_state_dict(self.model.state_dict())
        hub.config.dtype = torch.bfloat16
        hub.save_pretrained(run / "checkpoint")

    def load(self, run: Path) -> dict:
        state = torch.load(run / "state.pt", weights_only=True)
        for name, param in self.params.items():
            param.copy_(state["params"][name])
        for muon in self.muons:
            muon.buffers = {n: state["muon"][n] for n in muon.params}
        self.adam.load_state_dict(state["adam"])
        return state["done"]


def train(args: argparse.Namespace, recipe: Recipe) -> None:
    torch.manual_seed(recipe.seed)
    tokenizer = Tokenizer.from_file(str(args.data / "tokenizer" / "bpe2048.json"))
    domains = load_corpus(args.data / "tinylm_corpus", tokenizer)
    config = model_config(tokenizer.get_vocab_size(), args.top_k, args.inner)
    trainer = Trainer(config, recipe, args.threads)
    args.run.mkdir(parents=True, exist_ok=True)
    done = {"step": 0, "tokens": 0, "seconds": 0.0}
    if args.resume:
        done = trainer.load(args.run)
    batches = {
        s: MixedBatches(domains, recipe.tokens_per_step // s, s, recipe.seed + done["step"])
        for s in (recipe.seq_len, recipe.late_seq_len)
    }
    log = (args.run / "log.jsonl").open("a" if args.resume else "w")

    def record(**row: object) -> None:
        print(json.dumps(row), file=log, flush=True)

    sizes = {d.name: [len(d.train), len(d.held_out)] for d in domains}
    record(
        kind="start",
        recipe=asdict(recipe),
        minutes=args.minutes,
        note=args.note,
        tokens=sizes,
        done=done,
    )
    start = time.monotonic() - done["seconds"]
    budget = args.minutes * 60
    next_eval = done["seconds"] + args.eval_every * 60
    next_save = done["seconds"] + args.save_every * 60
    while (seconds := time.monotonic() - start) < budget:
        late = seconds > recipe.late_start * budget
        batch = batches[recipe.late_seq_len if late else recipe.seq_len].next()
        parts = trainer.step(batch, seconds / budget)
        done = {
            "step": done["step"] + 1,
            "tokens": done["tokens"] + batch[:, 1:].numel(),
            "seconds": time.monotonic() - start,
        }
        if done["step"] % 20 == 0:
            record(kind="train", **done, **parts)
            rate = done["tokens"] / done["seconds"]
            print(
                f"{done['step']:6d} {done['seconds']:7.0f} s {rate:6.0f} tok/s", parts, flush=True
            )
        if done["seconds"] > next_eval or done["seconds"] >= budget:
            next_eval = done["seconds"] + args.eval_every * 60
            losses, report = quick_eval(working_copy(trainer.params), trainer.config, domains)
            mean = sum(losses.values()) / len(losses)
            record(kind="eval", **done, mean_loss=mean, losses=losses, routing=report)
            print("  held out", round(mean, 3), {k: round(v, 2) for k, v in losses.items()})
            print("  routing", {k: round(v, 3) for k, v in report["headline"].items()}, flush=True)
        if done["seconds"] > next_save:
            next_save = done["seconds"] + args.save_every * 60
            trainer.save(args.run, done)
    trainer.save(args.run, done)
    record(kind="end", **done, threads=args.threads, torch=torch.__version__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=REPO.parent / "shared" / "data")
    parser.add_argument("--run", type=Path, required=True, help="folder for state, checkpoint, log")
    parser.add_argument("--minutes", type=float, default=60, help="wall-time budget of the run")
    parser.add_argument("--threads", type=int, default=2, help="workers, one core each")
    parser.add_argument("--top-k", type=int, default=4, help="experts that work on a token (4)")
    parser.add_argument("--inner", type=int, default=64, help="inner size of an expert (64)")
    parser.add_argument("--eval-every", type=float, default=5, help="minutes")
    parser.add_argument("--save-every", type=float, default=5, help="minutes")
    parser.add_argument("--resume", action="store_true", help="continue from state.pt in --run")
    parser.add_argument("--note", default="", help="what else changed at a restart, for the card")
    for name, value in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    args = parser.parse_args()
    recipe = Recipe(**{name: getattr(args, name) for name in asdict(Recipe())})
    train(args, recipe)


if __name__ == "__main__":
    main()
