"""Command line: prepare, train, export, sheet."""

import argparse
from pathlib import Path

MODELS = ("unet", "mmdit")
BUNDLED = Path("hybridiff_compiler/reference_models")


def main(argv: list[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    arguments.run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.reference_models", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(".train"), help="folder for data, checkpoints and weights")
    commands = parser.add_subparsers(required=True)

    prepare = commands.add_parser("prepare", help="emoji package -> training data and tokenizer")
    prepare.add_argument("--archive", type=Path, help="the package's .tgz; fetched with npm when left out")
    prepare.set_defaults(run=_prepare)

    train = commands.add_parser("train", help="train one network (resumes from its checkpoint)")
    train.add_argument("stage", choices=("vae", *MODELS))
    length = train.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="stop after this much training time")
    length.add_argument("--steps", type=int, help="stop after exactly this many steps")
    train.add_argument("--batch", type=int)
    train.add_argument("--views", type=int, default=64, help="augmented views per emoji held as latents")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--no-compile", action="store_true", help="leave torch.compile out (GPU only)")
    train.set_defaults(run=_train)

    export = commands.add_parser("export", help="weights -> diffusers folder, with model card and contact sheet")
    export.add_argument("model", choices=MODELS)
    export.add_argument("--out", type=Path, default=BUNDLED)
    export.add_argument("--untrained", action="store_true", help="random weights, for trying out the folders")
    export.add_argument("--verdict", default="not judged yet", help="what the model card says of the contact sheet")
    export.set_defaults(run=_export)

    sheet = commands.add_parser("sheet", help="contact sheet of an exported model")
    sheet.add_argument("model", choices=MODELS)
    sheet.add_argument("--folder", type=Path, default=BUNDLED)
    sheet.add_argument("--prompts", type=Path, help="text file, one prompt a line; 16 usual ones when left out")
    sheet.add_argument("--all", action="store_true", help="every emoji's first caption instead")
    sheet.add_argument("--out", type=Path, help="default: sheet.png in the model's folder")
    sheet.add_argument("--seed", type=int, default=0)
    sheet.add_argument("--guidance", type=float, default=5.0)
    sheet.add_argument("--columns", type=int, default=4)
    sheet.add_argument("--scale", type=int, default=2)
    sheet.add_argument("--batch", type=int, default=16)
    sheet.add_argument("--unlabelled", action="store_true", help="for guessing games")
    sheet.set_defaults(run=_sheet)
    return parser


def _prepare(arguments: argparse.Namespace) -> None:
    from .prepare import prepare

    prepare(arguments.archive, arguments.work)


def _train(arguments: argparse.Namespace) -> None:
    from .loop import Budget
    from .train import train

    train(
        arguments.stage,
        Budget(minutes=arguments.minutes, steps=arguments.steps),
        data=arguments.work,
        work=arguments.work,
        seed=arguments.seed,
        batch=arguments.batch,
        views=arguments.views,
        compile_denoiser=not arguments.no_compile,
    )


def _export(arguments: argparse.Namespace) -> None:
    from .export import export

    weights = None if arguments.untrained else arguments.work
    print(export(arguments.model, weights, arguments.work, arguments.out, arguments.verdict))


def _sheet(arguments: argparse.Namespace) -> None:
    from .sheet import SHEET_PROMPTS, draw, sheet

    folder = arguments.folder / arguments.model
    if arguments.all:
        import numpy as np

        with np.load(arguments.work / "data.npz") as arrays:
            prompts = [str(row[0]) for row in arrays["texts"]]
    elif arguments.prompts:
        prompts = arguments.prompts.read_text().split("\n")
    else:
        prompts = list(SHEET_PROMPTS)
    prompts = [prompt for prompt in prompts if prompt]
    images = draw(folder, prompts, seed=arguments.seed, guidance=arguments.guidance, batch=arguments.batch)
    labels = [""] * len(prompts) if arguments.unlabelled else prompts
    out = arguments.out or folder / "sheet.png"
    print(sheet(images, labels, out, columns=arguments.columns, scale=arguments.scale))


if __name__ == "__main__":
    main()
