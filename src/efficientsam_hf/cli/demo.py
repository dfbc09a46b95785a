# SPDX-License-Identifier: Apache-2.0
"""`efficientsam demo`: the browser demo on this machine, the very app of the Space."""

import argparse
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from ..space import space_folder
from .loading import check_name, model_name


DESCRIPTION = """\
Segment in the browser: with clicks, with a box, or everything. The page is the one of the Space; it stays on this
machine unless --share or --host say otherwise."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register the command."""
    parser = subparsers.add_parser("demo", help="segment in the browser", description=DESCRIPTION)
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="folder or Hub name (default: the checkpoint that ships)"
    )
    parser.add_argument("--host", default="127.0.0.1", metavar="H", help="address to serve on (127.0.0.1)")
    parser.add_argument("--port", type=int, metavar="N", help="port (default: the first free one from 7860)")
    parser.add_argument("--share", action="store_true", help="also give it a public address by gradio's relay")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check, load the model, serve until stopped."""
    if importlib.util.find_spec("gradio") is None:
        raise ImportError("the demo needs gradio: pip install 'efficientsam-hf[demo]'")
    if args.port is not None and not 0 < args.port < 65536:
        raise ValueError(f"--port must be between 1 and 65535, got {args.port}")
    name = model_name(args.model or "default")
    check_model(name)
    app = import_app(space_folder())
    blocks = app.build(app.Segmenter(name, trust_remote_code=False))
    app.launch(blocks, server_name=args.host, server_port=args.port, share=args.share)
    return 0


def check_model(name: str) -> None:
    """`ValueError` unless a folder or Hub name holds a whole model of this package; no code of theirs is executed."""
    from transformers import AutoConfig

    from .. import EfficientSamConfig, EfficientSamModel, EfficientSamProcessor
    from ..pretrained import load_config, load_pretrained, load_processor

    check_name(name)
    kind = load_config(AutoConfig, name).model_type
    if kind != EfficientSamConfig.model_type:
        raise ValueError(f"the demo is for EfficientSAM models, {name} is of type {kind}")
    load_processor(EfficientSamProcessor, name)
    load_pretrained(EfficientSamModel, name)  # the app loads it again, as it does on a Space, without looking closely


def import_app(folder: Path) -> Any:
    """The app as a module. Its files import each other by plain names, as they do on a Space."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    sys.path.insert(0, str(folder))
    return importlib.import_module("app")
