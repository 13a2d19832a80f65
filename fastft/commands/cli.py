"""The command ``fastft``: ``finetune``, ``data-report``, ``bench``, ``demo`` and ``info``."""

from __future__ import annotations

import argparse
import importlib.util
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import fastft
from fastft.commands.finetune import add_arguments


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``fastft`` with command-line arguments (``sys.argv``'s by default); its exit status."""
    top = parser()
    options, unknown = top.parse_known_args(arguments)
    if unknown:
        top.prog += f" {options.command}"  # whose --help tells what there is
        top.error(f"unrecognized arguments: {' '.join(unknown)}")
    if options.command == "finetune":
        from fastft.commands.finetune import run as finetune

        return finetune({k: v for k, v in vars(options).items() if k not in ("command", "config")}, options.config)
    if options.command == "demo":
        from fastft.commands.demo import run

        return run(options.output, options.quick, options.seed, options.overwrite)
    if options.command == "data-report":
        return report_on_data(options)
    if options.command == "bench":
        from fastft.commands.bench import run as bench

        return bench(options.case, device=options.device, quick=options.quick, json_file=options.json)
    print(info())
    return 0


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, instead of listing all there is."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = Parser(prog="fastft", description="Fine-tune large pre-trained models without losing what they know.")
    top.add_argument("--version", action="version", version=f"fastft {fastft.__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    finetune = commands.add_parser(
        "finetune",
        help="fine-tune a model on your own rows",
        description="Fine-tunes a pre-trained model on a file of texts, with fastft.AdamW in the Hugging Face Trainer. "
        "Prints what it was before and is after, and leaves a folder that from_pretrained loads.",
        allow_abbrev=False,
    )
    add_arguments(finetune)

    demo = commands.add_parser(
        "demo",
        help="fine-tune a real model with torch's AdamW and with fastft, and compare",
        description="Fine-tunes the 22-million-parameter MiniLM on movie reviews: with torch.optim.AdamW, with "
        "fastft.AdamW and an anchor, and with gradual unfreezing besides; shows what each run learned and what it "
        "forgot. Minutes, on a CPU.",
    )
    demo.add_argument(
        "--output",
        type=Path,
        default=Path("fastft-demo"),
        metavar="FOLDER",
        help="where report.json, plot.png and model/ go (default: ./%(default)s)",
    )
    demo.add_argument("--quick", action="store_true", help="fewer rows, for a first look: some minutes on two cores")
    demo.add_argument("--seed", type=seed, default=0, help="of the order of batches and of dropout (default: 0)")
    demo.add_argument("--overwrite", action="store_true", help="write into a folder that is not empty")

    data = commands.add_parser(
        "data-report",
        help="look at a data set before training on it: repetitions, leakage, balance, lengths",
        description="Reads a csv, tsv, jsonl or parquet file (text formats also gzipped) and writes a page on what is "
        "wrong with it and what to do about that: report.md with plot.png, and report.json.",
    )
    data.add_argument("file", type=Path, metavar="FILE", help="the training data")
    data.add_argument("--eval", type=Path, metavar="FILE", help="the evaluation data, looked for in the training data")
    data.add_argument("--text-column", metavar="NAME", help="default: one with a usual name, else the longest texts")
    data.add_argument("--label-column", metavar="NAME", help="default: one with a usual name, or none")
    data.add_argument(
        "--output",
        type=Path,
        default=Path("fastft-data-report"),
        metavar="FOLDER",
        help="where the page goes (default: ./%(default)s)",
    )
    data.add_argument("--overwrite", action="store_true", help="write into a folder that is not empty")

    bench = commands.add_parser(
        "bench",
        help="measure fastft next to torch and other libraries, on this machine",
        description="Measures fastft's AdamW and dropout alternately with torch's and, where they are installed, other "
        "libraries' in one process, compares their results, and prints a table. All of it takes some minutes.",
    )
    bench.add_argument(
        "--case",
        action="append",
        default=[],
        metavar="NAME",
        help="a case, a family of cases (dropout, step, size, ...) or a pattern; may be repeated (default: all)",
    )
    bench.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    bench.add_argument("--quick", action="store_true", help="few rounds, and without what takes longest to prepare")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")

    commands.add_parser(
        "info",
        help="print versions, devices, and whether CUDA can be used",
        description="Prints what this installation is and can do; paste it into a bug report.",
    )
    return top


def seed(text: str) -> int:
    """A seed from the command line: a whole number from 0 to 2⁶³ − 1, as ``torch.manual_seed`` takes it."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 2**63 - 1, got {text!r}")
    return value


def report_on_data(options: argparse.Namespace) -> int:
    """``fastft data-report``: 0 done, 1 the files could not be written, 2 wrong usage, 130 interrupted."""
    from fastft.data import FileError, data_report, read_table
    from fastft.output import OutputError, staged

    def fail(message: object, status: int) -> int:
        print(f"fastft data-report: {message}", file=sys.stderr)
        return status

    missing = [name for name in ("datasets", "datasketch", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        return fail(f'missing {", ".join(missing)}; install what it needs with: pip install "fastft[data]"', 2)
    eval_name = ""
    if options.eval is not None:
        eval_name = options.eval.name if options.eval.name != options.file.name else str(options.eval)
    try:
        with staged(options.output, options.overwrite) as folder:
            report = data_report(
                read_table(options.file),
                read_table(options.eval) if options.eval is not None else None,
                text_column=options.text_column,
                label_column=options.label_column,
                name=options.file.name,
                eval_name=eval_name,
            )
            report.write(folder)
    except (OutputError, FileError, ValueError) as error:
        return fail(error, 2)
    except OSError as error:
        return fail(f"could not finish: {error}", 1)
    except KeyboardInterrupt:
        return fail("interrupted; nothing was written", 130)
    print(f"{report.summary()}\nWritten to {options.output}: report.md, plot.png, report.json")
    return 0


def info() -> str:
    """Versions, devices, and whether CUDA can be used and why not, as aligned lines."""
    import torch

    import fastft
    from fastft import _C

    cuda_torch = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    lines = {
        "fastft": fastft.__version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__} ({cuda_torch})",
        "cpu": f"{_C.cpu_instruction_set()} loops, {torch.get_num_threads()} threads",
        "cuda code": f"in this build, for {architectures(_C.cuda_archs)}" if _C.cuda_archs else "not in this build",
    }
    reason = why_no_cuda()
    if reason:
        lines["cuda"] = f"cannot be used: {reason}"
    else:
        for index in range(torch.cuda.device_count()):
            lines[f"cuda:{index}"] = describe_gpu(index)
    width = max(map(len, lines))
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in lines.items())


def architectures(archs: str) -> str:
    """``"75 80"`` as ``"sm_75, sm_80 (and newer, by PTX)"``."""
    return f"{', '.join(f'sm_{arch}' for arch in archs.split())} (and newer, by PTX)"


def why_no_cuda() -> str:
    """Why tensors on a GPU cannot be stepped by this build under this torch, or "" if they can."""
    import torch

    from fastft import _C

    if reason := _C.cuda_unavailable():
        return reason
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
    if not torch.cuda.is_available():
        return "torch.cuda.is_available() is False"
    return ""


def describe_gpu(index: int) -> str:
    """A GPU's name, memory, and whether there is code for it."""
    import torch

    from fastft import _C

    properties = torch.cuda.get_device_properties(index)
    capability = 10 * properties.major + properties.minor
    oldest = min(int(arch) for arch in _C.cuda_archs.split())
    usable = "" if capability >= oldest else f"; too old: the code in this build needs sm_{oldest} or newer"
    memory = properties.total_memory / 2**30
    return f"{properties.name}, sm_{capability}, {memory:.0f} GiB{usable}"


if __name__ == "__main__":
    sys.exit(main())
