# SPDX-License-Identifier: Apache-2.0
"""`efficientsam push`: a run, or a model folder, becomes a repository on the Hub."""

import argparse
import re
from pathlib import Path


DESCRIPTION = """\
Publish a model on the Hugging Face Hub in one commit: weights, config, processor, the code for trust_remote_code, a
card made from the run, metrics and a picture. RUN is a run folder (its model is exported to RUN/hub first), or a
folder that efficientsam export or convert wrote, which is published as it is.

  efficientsam push runs/nuclei my-name/efficientsam-nuclei --metrics metrics.json --dry-run
  efficientsam push runs/nuclei my-name/efficientsam-nuclei --metrics metrics.json --space my-name/nuclei-demo

Log in with `hf auth login`, or set HF_TOKEN, or give --token-file. A command that was cut off is
given again: nothing is published by halves, and weights that arrived are not sent twice."""


LONGEST_TOKEN = 1000


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "push",
        help="publish a model, and a Space that shows it, on the Hub",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_folder", metavar="RUN", help="run folder, or model folder with its card")
    parser.add_argument("repo_id", metavar="REPO_ID", help="OWNER/NAME on the Hub")
    parser.add_argument("--dry-run", action="store_true", help="write the folder and say what would be sent")
    _add_export_options(parser.add_argument_group("the folder (for runs)"))
    group = parser.add_argument_group("the repository")
    group.add_argument(
        "--private", action="store_true", help="make a new repository private; an error if there is a public one"
    )
    group.add_argument("--gated", choices=("auto", "manual"), help="who wants the files must ask")
    group.add_argument("--branch", metavar="NAME", help="commit to this branch (main)")
    group.add_argument("--pull-request", action="store_true", help="propose the commit instead of making it")
    group.add_argument("--tag", metavar="NAME", help="name for the commit, such as v1.0")
    group.add_argument("--message", default="Upload model", help="first line of the commit")
    group.add_argument("--space", metavar="SPACE_ID", help="create or update a Gradio Space that shows the model")
    tokens = group.add_mutually_exclusive_group()
    tokens.add_argument("--token-file", metavar="FILE", help="file with a token, instead of that of `hf auth login`")
    tokens.add_argument(
        "--token",
        metavar="TOKEN",
        help="the token itself; whoever is logged in on this machine can read it in the list of processes (ps), and "
        "the shell keeps it in its history, so one of the other ways is better",
    )
    parser.set_defaults(run=run)


def _add_export_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--metrics", nargs="+", metavar="A.json", help="results of efficientsam evaluate --output")
    group.add_argument("--speed", metavar="S.json", help="result of efficientsam benchmark --output")
    group.add_argument("--license", metavar="ID", help="of the weights, by the Hub's names (apache-2.0)")
    group.add_argument("--best", action="store_true", help="the model of the best evaluation, not the last one")
    group.add_argument("--full-precision", action="store_true", help="store the weights as float32")
    group.add_argument(
        "--preview", action="store_true", help="publish the run's last picture of training data too (scenes: always)"
    )


def run(args: argparse.Namespace) -> int:
    """Export where there is a run, then publish, and say what went where."""
    from transformers.utils.logging import disable_progress_bar

    from ..hub.push import HubTarget, check_repo_id, check_space, push_folder, push_space, read_folder
    from ..space import space_folder

    token = read_token(args.token, args.token_file)
    target = HubTarget(args.repo_id, args.private, args.branch, args.pull_request, args.tag, args.gated, args.message)
    if args.space:
        check_repo_id("--space", args.space)
        if args.branch or args.pull_request:
            raise ValueError("--space shows what is on main, so it goes without --branch and --pull-request")
    disable_progress_bar()
    folder = _folder(args)
    files = read_folder(folder)
    if args.dry_run:
        _print_plan(args, folder, files)
        return 0
    if args.space:
        check_space(args.space, args.repo_id, files, args.private, token)
    print(f"published {push_folder(folder, target, token)}")
    if args.space:
        address, needs_token = push_space(args.space, args.repo_id, space_folder(), token)
        print(f"published {address}")
        if needs_token:
            print(f"not everyone may read the model: give {args.space} a secret HF_TOKEN that may")
    return 0


def read_token(token: str | None, file: str | None) -> str | None:
    """The token that is given, or the one in a file; None if neither is. No error shows any of it."""
    option = "--token"
    if file is not None:
        option = f"--token-file {file}"
        try:
            with open(file, encoding="ascii") as opened:
                token = opened.read(LONGEST_TOKEN + 1).strip()
        except UnicodeDecodeError:
            raise ValueError(f"{option} does not hold a token: it is no text in ASCII") from None
        except OSError as error:
            raise OSError(f"{option} cannot be read: {error.strerror}") from None
    if token is not None and not re.fullmatch(rf"[!-~]{{1,{LONGEST_TOKEN}}}", token):
        raise ValueError(f"{option} does not hold a token: expected one word of ASCII, got {len(token)} characters")
    return token


def _folder(args: argparse.Namespace) -> Path:
    """The folder to publish: made from a run, or the one that was given."""
    from ..hub.model_folder import export_run

    source = Path(args.run_folder)
    if not source.is_dir():
        raise FileNotFoundError(f"RUN {args.run_folder} is not a folder")
    if (source / "args.json").is_file():
        destination = source / "hub"
        return export_run(
            source, destination, not args.full_precision, args.metrics, args.speed, with_code=True, overwrite=True,
            license=args.license or "apache-2.0", name=args.repo_id.rpartition("/")[2], preview=args.preview,
            best=args.best,
        )  # fmt: skip
    given = [
        name for name in ("metrics", "speed", "license", "full_precision", "preview", "best") if getattr(args, name)
    ]
    if given:
        option = given[0].replace("_", "-")
        raise ValueError(f"--{option} is for run folders, and {args.run_folder} is none: it is published as it is")
    return source


def _print_plan(args: argparse.Namespace, folder: Path, files: dict[str, Path]) -> None:
    """What a push would send, file by file."""
    sizes = {name: path.stat().st_size for name, path in files.items()}
    for name, size in sizes.items():
        print(f"{size:>12,}  {name}")
    kind = "private" if args.private else "public"
    print(f"{sum(sizes.values()):>12,}  bytes in {len(sizes)} files would go to {args.repo_id} ({kind} if it is new)")
    if args.space:
        print(f"the Space {args.space} would show it")
    print(f"nothing was sent; the folder is {folder}")
