"""The command line: arguments, and what a user sees when something is wrong.

A mistake is one line on stderr and exit code 2, never a traceback (`--traceback` shows it);
Ctrl-C is 130. Nothing heavy is imported before a command runs, so `--help` and a malformed budget
answer at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import moe_offload
from moe_offload.errors import MoEOffloadError
from moe_offload.policies import LIVE_POLICIES, POLICIES

_MODEL = "a checkpoint folder, a hub id, or `tiny`, the small model that comes with this package"
_BUDGET = 'memory for experts: bytes, "6GiB", "500MB" or a share of all experts, "25%%"'
_EXAMPLES = """\
examples:
  moe-offload demo
  moe-offload generate tiny --prompt "Once upon a time" --device-budget 25%
  moe-offload plan path/to/checkpoint --device-budget 6GiB
"""
FAILED, USAGE, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141


class _Parser(argparse.ArgumentParser):
    """Like every other mistake, a wrong argument is one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="moe-offload",
        description="Run Mixture-of-Experts models that do not fit, by paging their experts.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    common = _Parser(add_help=False)
    common.add_argument("--traceback", action="store_true", help="show where an error comes from")

    def add(name: str, help: str, description: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=description, parents=[common])

    add(
        "demo",
        "run the packaged model at several budgets",
        "Generate from real prompts with the packaged model at several budgets, and compare every "
        "run with plain transformers. Takes less than a minute.",
    )
    _add_generate(
        add(
            "generate",
            "generate text, experts paged from disk",
            "Generate text with the experts of MODEL paged from disk. The text streams to stdout; "
            "with --json a last line holds one JSON object with tokens, speed and counters.",
        )
    )
    plan = add(
        "plan",
        "what a budget means for a model",
        "Show where the bytes of MODEL go under a budget, and the smallest budget that works. "
        "Reads config.json and file headers only.",
    )
    _add_model(plan)
    plan.add_argument("--json", action="store_true", help="print one JSON object")
    doctor = add(
        "doctor",
        "what this machine and installation have",
        "Show what was built, what was found, what is missing and how to get it. "
        "Exits with 1 when something needed is missing.",
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    verify = add(
        "verify",
        "compare with the resident model",
        "Run MODEL offloaded, under deliberately hostile timing, and resident (all experts in "
        "memory), and compare tokens and logits. Exits with 1 when they differ.",
    )
    _add_model(verify)
    verify.add_argument(
        "--prompt", action="append", metavar="TEXT", help="may be given several times"
    )
    verify.add_argument("--max-new-tokens", type=_count, default=16, metavar="N")
    _add_train_predictor(
        add(
            "train-predictor",
            "train a predictor from routing traces",
            "Train a predictor of KIND from recorded traces, or from what MODEL writes after the "
            "prompts of a file, and save it with a card. A share of the sequences is only used to "
            "judge it.",
        )
    )
    _add_ablate(
        add(
            "ablate",
            "the same prompts with each predictor and without",
            "Generate with each predictor, without one and with an oracle, compare every token, "
            "and print what each saved, wasted and cost.",
        )
    )
    _add_replay(
        add(
            "replay",
            "what cache policies would have done with a routing trace",
            "Replay TRACE against cache policies and print one row per policy, cap and batch. "
            "Belady's rows are the line nobody beats.",
        )
    )
    return parser


def _add_train_predictor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "kind",
        choices=("rpp", "preattention", "pregate"),
        metavar="KIND",
        help="rpp: from "
        "the tokens alone; preattention: linear heads on the layers' inputs; pregate: a gate for "
        "the next layer's experts on what a router sees; both need --model",
    )
    parser.add_argument(
        "--trace",
        action="append",
        default=[],
        metavar="F",
        help="a recorded trace; may be given several times",
    )
    parser.add_argument("--model", metavar="MODEL", help=_MODEL)
    parser.add_argument("--device-budget", default="25%", metavar="B", help=f"{_BUDGET} (25%%)")
    parser.add_argument("--prompts", metavar="F", help="one prompt per line, which MODEL continues")
    parser.add_argument("--max-new-tokens", type=_count, default=128, metavar="N", help="(128)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--data", metavar="TEXT", help="what the data is, for the card")
    parser.add_argument("--steps", type=_count, default=2000, metavar="N", help="at most (2000)")
    parser.add_argument("--minutes", type=_at_least_zero, metavar="X", help="at most")
    parser.add_argument("--batch", type=_count, default=12, metavar="N", help="sequences (12)")
    parser.add_argument("--held-out", type=_share, default=0.1, metavar="X", help="share (0.1)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_ablate(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument(
        "--predictor",
        action="append",
        metavar="P",
        help="a name or the folder of "
        "a trained predictor; may be given several times (all that fit MODEL)",
    )
    parser.add_argument(
        "--policy",
        choices=LIVE_POLICIES,
        default="auto",
        metavar="POLICY",
        help="which expert leaves (auto)",
    )
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="may be given several times (packaged prompts)",
    )
    parser.add_argument("--max-new-tokens", type=_count, default=64, metavar="N", help="(64)")
    parser.add_argument("--repeats", type=_count, default=3, metavar="N", help="runs of each (3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_replay(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "trace", metavar="TRACE", help="an .npz that `record` wrote, or a known published one"
    )
    parser.add_argument(
        "--policy",
        type=_listed(str),
        default=["lru", "belady-bypass"],
        metavar="A,B",
        help=f"of {', '.join(POLICIES)}, or `all`; with +recall behind it, the predictor recall "
        "prefetches (lru,belady-bypass)",
    )
    parser.add_argument(
        "--cap", type=_listed(float), default=[0.25], metavar="X,Y", help="shares of slots (0.25)"
    )
    parser.add_argument(
        "--batch",
        type=_listed(_batch),
        default=[1],
        metavar="N,M",
        help="streams side by side, or `recorded` for the model calls as they were (1)",
    )
    parser.add_argument("--plot", metavar="DIR", help="write figures and report.html there")
    parser.add_argument("--json", action="store_true", help="print one JSON list")


def _listed(element: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def parse(text: str) -> list[Any]:
        try:
            return [element(part.strip()) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a list such as 1,4, got {text!r}") from None

    return parse


def _batch(text: str) -> int | str:
    return text if text == "recorded" else int(text)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=_MODEL)
    parser.add_argument("--device-budget", default="25%", metavar="B", help=f"{_BUDGET} (25%%)")


def _add_generate(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the text to continue")
    prompt.add_argument("--prompt-file", metavar="F", help="a file that holds it; - for stdin")
    parser.add_argument("--policy", choices=LIVE_POLICIES, help="which expert leaves (auto)")
    parser.add_argument(
        "--predictor",
        metavar="P",
        help="what is fetched early: a name, or the folder of a trained predictor (none)",
    )
    parser.add_argument(
        "--preset", metavar="NAME", help="policy and predictor of a published system, or `auto`"
    )
    parser.add_argument("--max-new-tokens", type=_count, default=64, metavar="N", help="(64)")
    parser.add_argument(
        "--temperature", type=_at_least_zero, default=0.0, metavar="X", help="0 is greedy (0)"
    )
    parser.add_argument(
        "--top-p", type=_share, default=1.0, metavar="X", help="nucleus for sampling (1)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling (0)")
    parser.add_argument("--timeline", metavar="F", help="write a Perfetto trace of the paging")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _at_least_zero(text: str) -> float:
    return _number(text, "a number of at least 0", lambda value: value >= 0)


def _share(text: str) -> float:
    return _number(text, "a number above 0 and at most 1", lambda value: 0 < value <= 1)


def _number(text: str, expected: str, good: Callable[[float], bool]) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not good(value):
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return value


def _version() -> str:
    return moe_offload.__version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. argparse exits by itself on --help and mistakes."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        if args.command is None:
            print(parser.format_help(), end="")  # print_help would hide a broken pipe
            code = 0
        else:
            code = _COMMANDS[args.command](args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("\nmoe-offload: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `moe-offload ... | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Exception as error:
        if args.traceback:
            raise
        sys.stdout.flush()
        print(f"moe-offload {args.command}: {_one_line(error)}", file=sys.stderr)
        return USAGE


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, MoEOffloadError | ImportError) and text:
        return text
    return f"{type(error).__name__}: {text} (--traceback shows where)"


def _generate(args: argparse.Namespace) -> int:
    from moe_offload.cli_generate import generate

    return generate(args)


def _verify(args: argparse.Namespace) -> int:
    from moe_offload.cli_generate import verify

    return verify(args)


def _demo(args: argparse.Namespace) -> int:
    from moe_offload.demo import demo

    return demo()


def _replay(args: argparse.Namespace) -> int:
    from moe_offload.cli_replay import replay

    return replay(args)


def _plan(args: argparse.Namespace) -> int:
    from moe_offload.config import OffloadConfig

    OffloadConfig(device_budget=args.device_budget)
    from moe_offload.cli_generate import quiet, resolve_model
    from moe_offload.planning import plan

    quiet()
    result = plan(resolve_model(args.model), args.device_budget)
    print(json.dumps(result.as_dict()) if args.json else result)
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from moe_offload.doctor import examine, render

    report = examine()
    print(json.dumps(report) if args.json else render(report))
    return 0 if report["works"] else FAILED


def _train_predictor(args: argparse.Namespace) -> int:
    from moe_offload.predictors.train_command import train_predictor

    return train_predictor(args)


def _ablate(args: argparse.Namespace) -> int:
    from moe_offload.ablation import command
    from moe_offload.config import OffloadConfig

    OffloadConfig(device_budget=args.device_budget)
    return command(args)


_COMMANDS = {
    "ablate": _ablate,
    "demo": _demo,
    "doctor": _doctor,
    "generate": _generate,
    "plan": _plan,
    "replay": _replay,
    "train-predictor": _train_predictor,
    "verify": _verify,
}
