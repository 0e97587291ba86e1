"""`hybridiff show`: a profile, plan, bundle or benchmark result as text, and as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..planner.forecast import Forecast

__all__ = ["command"]

_OTHER = "{}: is no profile, plan or result of demo or bench; these are the files that show prints"


def command(
    file: Annotated[Path, typer.Argument(
        metavar="FILE", help="A profile, a plan, a bundle, or the JSON of demo or bench.")],
    other: Annotated[Path | None, typer.Argument(
        metavar="OTHER", help="With two profiles: print what changed from FILE to OTHER.")] = None,
    profile: Annotated[Path | None, typer.Option(
        help="With a plan: the profile that it was made from, to explain the choice and time the pictures.")] = None,
    png: Annotated[Path | None, typer.Option(
        help="Also draw a profile's curves, or a plan's timeline, into this PNG file.")] = None,
    html: Annotated[Path | None, typer.Option(
        help="Also write this HTML page: the same pictures, if any, and what is printed.")] = None,
    trace: Annotated[Path | None, typer.Option(
        help="With a plan and --profile: the predicted timeline as a trace for Perfetto or chrome://tracing.")] = None,
    json_mode: Annotated[bool, typer.Option("--json", help="Print the validated document as one JSON object.")] = False,
) -> None:
    """Print FILE as tables, text plots, pattern tables and a timeline."""
    from ..ir import UsageError
    from .files import check_writable
    from .output import opened

    if trace is not None and profile is None:
        raise UsageError("--trace needs the times of a profile; give the one that the plan was made from as --profile")
    targets = [target for target in (png, html, trace) if target is not None]
    if len({target.resolve() for target in targets}) < len(targets):
        raise UsageError("got one file for two of --png, --html and --trace; give each its own")
    for target in targets:
        check_writable(target)
    with opened(json_mode) as out:
        human, machine = _read(file) if other is None else _compared(file, other)
        if profile is not None:
            more, machine = _explained(file, profile, machine)
            human += more
        if targets:
            human += _pictures(file if other is None else None, profile, human, png, html, trace)
        out.result(*human, machine=lambda: machine)


def _read(file: Path) -> tuple[list[Any], Any]:
    """What to print for people, and for machines.

    Raises:
        InputError: the file is missing, damaged, or none of the known kinds.
    """
    from ..ir import InputError, Plan, Profile
    from ..report import BenchResults, Results, bench_tables, describe_plan, describe_profile, results_table

    if file.is_dir():
        from ..bundle import Bundle
        from ..report.describe_bundle import describe_bundle

        bundle = Bundle.open(file)
        return [*describe_bundle(bundle), *describe_plan(bundle.plan)], bundle.manifest.model_dump(mode="json")
    payload = _payload(file)
    kind = payload.get("kind")
    if kind == "profile":
        profile = Profile.load(file)
        return describe_profile(profile), profile.model_dump(mode="json")
    if kind == "plan":
        plan = Plan.load(file)
        return describe_plan(plan), plan.model_dump(mode="json")
    if "gpus" in payload and "models" in payload:
        bench = BenchResults.parse(payload, source=str(file))
        return list(bench_tables(bench)), bench.to_json()
    if "versions" in payload and "models" in payload:
        from ..quality.bench_decode import DecodeResults
        from .bench_decode import decode_tables

        decode = DecodeResults.parse(payload, source=str(file))
        return list(decode_tables(decode)), decode.to_json()
    if "schema" in payload and "models" in payload:
        results = Results.parse(payload, source=str(file))
        tables = [results_table(f"{name} on {results.device}", rows) for name, rows in results.models.items()]
        return list(tables), results.to_json()
    raise InputError(_OTHER.format(file))


def _pictures(
    file: Path | None, profile: Path | None, human: Sequence[Any], png: Path | None, html: Path | None,
    trace: Path | None,
) -> list[str]:
    """Write the pictures of what `file` holds; the lines that say so.

    Args:
        file: None where there is nothing to draw.
        profile: of the times of a plan's timeline.
        human: what is printed.
        png, html, trace: where to write.

    Raises:
        UsageError: there is nothing to draw, or the document has no timeline.
    """
    from ..ir import UsageError
    from ..report.figures import save_html, save_png

    figures, times, title = ([], None, "comparison") if file is None else _drawn(file, profile)
    written = []
    if trace is not None:
        from ..report.plan_figures import save_trace

        if times is None:
            raise UsageError(f"{file}: holds no plan; --trace writes the timeline of one")
        written.append(f"wrote {save_trace(times, trace)}")
    if png is not None:
        if not figures:
            raise UsageError("--png draws a profile or a plan; give one (--html takes the tables of anything)")
        written.append(f"wrote {save_png(figures, png)}")
    if html is not None:
        from .output import as_text

        written.append(f"wrote {save_html(figures, html, title=title, text=as_text(human))}")
    return written


def _drawn(file: Path, profile: Path | None) -> tuple[list[Figure], Forecast | None, str]:
    """Figures of a profile, plan or bundle; with a profile's times the forecast of a plan; a title."""
    from ..ir import Plan, Profile
    from ..planner.forecast import forecast
    from ..report import representative_steps
    from ..report.plan_figures import timeline_figure
    from ..report.profile_figures import profile_figures

    if file.is_dir():
        from ..bundle import Bundle

        plan = Bundle.open(file).plan
    else:
        kind = _payload(file).get("kind")
        if kind == "profile":
            loaded = Profile.load(file)
            return profile_figures(loaded), None, f"profile of {loaded.model.name}"
        if kind != "plan":
            return [], None, file.name
        plan = Plan.load(file)
    figures, times = [timeline_figure(plan)], None
    if profile is not None:
        times = forecast(Profile.load(profile), plan, representative_steps(plan.schedule))
        figures.append(timeline_figure(plan, times))
    return figures, times, f"plan for {plan.model.name}"


def _compared(file: Path, other: Path) -> tuple[list[Any], Any]:
    """What changed between two profiles.

    Raises:
        InputError: one of the files is no profile.
    """
    from ..ir import Profile
    from ..report import describe_diff, diff_profiles

    diff = diff_profiles(Profile.load(file), Profile.load(other), (str(file), str(other)))
    return describe_diff(diff), diff.to_json()


def _explained(file: Path, profile: Path, machine: Any) -> tuple[list[Any], Any]:
    """Why the plan in `file` is as it is, for people, and with the plan for machines.

    Raises:
        UsageError: the file holds no plan.
    """
    from dataclasses import asdict

    from ..ir import Plan, Profile, UsageError
    from ..planner import explain
    from ..report import describe_explanation

    if not isinstance(machine, dict) or machine.get("kind") != "plan":
        raise UsageError(f"{file}: holds no plan; --profile explains plans")
    found = explain(Profile.load(profile), Plan.load(file))
    return describe_explanation(found), {"plan": machine, "explanation": asdict(found)}


def _payload(file: Path) -> dict[str, Any]:
    from ..ir import InputError, parse_json

    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; give a profile, a plan, or the JSON of demo or bench") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read: {error}") from None
    payload = parse_json(text, source=str(file), noun="file")
    if not isinstance(payload, dict):
        raise InputError(_OTHER.format(file))
    return payload
