"""The command line: parse, call one function, print. Heavy imports wait until a command runs."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from regraft.__version__ import __version__
from regraft.errors import RegraftError

if TYPE_CHECKING:
    from regraft.recipe import Say

SPEC_HELP = (
    "default (EfficientNet-Lite0, ImageNet, no download), scratch (the same network with random weights, frozen), "
    "or a timm name such as resnet50.a1_in1k."
)
GROUP_HELP = "Regular expression; pictures with the same first bracket, searched in the path inside the class folder, "
GROUP_HELP += "are never parted."


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="regraft")
def main() -> None:
    """Reuse the right number of layers of a pretrained network on your own few examples.

    \b
    Example:
      regraft fit photos/ --out run/
      regraft predict run/ new.jpg
    """


def _debug(context: click.Context, parameter: click.Parameter, value: bool) -> bool:
    context.obj = value
    return value


def _shared(command: Callable[..., None]) -> Callable[..., None]:
    """The flags that every command has."""
    command = click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")(command)
    return click.option(
        "--debug", is_flag=True, expose_value=False, callback=_debug, help="Show the traceback of an error."
    )(command)


def _learning(command: Callable[..., None]) -> Callable[..., None]:
    """The flags of the commands that learn."""
    for option in (
        click.option("--group", metavar="REGEX", help=GROUP_HELP),
        click.option("--seed", default=0, show_default=True, help="Seed of the folds."),
        click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True),
        click.option("--strict", is_flag=True, help="Stop when any picture would have to be left out."),
        click.option("--allow-empty-class", is_flag=True, help="Keep the place of a class folder without pictures."),
    ):
        command = option(command)
    return command


@main.command()
@click.argument("data")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory of the run.")
@click.option("--backbone", default="default", show_default=True, metavar="SPEC", help=SPEC_HELP)
@click.option("--test", metavar="DATA", help="Pictures that only the finished model sees.")
@_learning
@_shared
def fit(data: str, out: Path, as_json: bool, **options: Any) -> None:
    """Do the whole job: curve, choice, final model, report.

    Re-running an interrupted command continues it; a finished run is shown as it is.

    \b
    DATA is a folder of class folders (with or without train/, val/, test/) or a .npz
    file with `images` and `labels`.

    \b
    Example:
      regraft fit photos/ --out run/
    """
    from regraft import recipe

    with _errors(f"what was computed is kept; `regraft fit {data} --out {out}` continues"), _progress(as_json) as say:
        run = recipe.fit(data, out=out, say=say, **options)
    if as_json:
        _print_json(run.record)
        return
    _print_curve(run.record["curve"], run.record["data"]["left_out"])
    if run.record["test"]:
        click.echo(_tested(run.record["test"]))
    click.echo(f"report: {run.folder / 'report.html'}")


@main.command()
@click.argument("data")
@click.option("--backbone", "backbones", default=["default"], multiple=True, metavar="SPEC", help=SPEC_HELP)
@_learning
@_shared
def curve(data: str, backbones: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Show how many layers to reuse: the score with its interval at every cut.

    Give --backbone several times to rank several networks.

    \b
    Example:
      regraft curve photos/
      regraft curve photos/ --backbone default --backbone scratch
    """
    from regraft import recipe

    with _errors("what was computed is kept; the same command continues"), _progress(as_json) as say:
        found = [recipe.curve(data, backbone, say=say, **options) for backbone in backbones]
    documents = [one.to_json() | {"left_out": len(one.problems)} for one in found]
    documents.sort(key=lambda d: -d["score"])
    if as_json:
        ranked = [{"backbone": d["backbone"]["spec"], "score": d["score"], "interval": d["interval"]} for d in documents]
        _print_json(documents[0] | {"ranking": ranked, "backbones": documents})
        return
    for document, one in zip(documents, sorted(found, key=lambda o: -o.choice.score.score), strict=True):
        if len(documents) > 1:
            click.echo(f"\n{document['backbone']['spec']}")
        _print_curve(document, [{"where": p.where, "reason": p.reason} for p in one.problems])


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("paths", nargs=-1, required=True)
@click.option("--top", default=1, show_default=True, type=click.IntRange(1), help="Labels per picture.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@_shared
def predict(run: Path, paths: tuple[str, ...], top: int, device: str, as_json: bool) -> None:
    """Print labels and probabilities for files, folders, or paths on standard input (-).

    \b
    Example:
      regraft predict run/ new.jpg more-pictures/ --top 3
      find . -name '*.jpg' | regraft predict run/ -
    """
    from regraft.artifact import load_model
    from regraft.data import printable
    from regraft.predict import predict_paths

    with _errors("nothing was changed"):
        model = load_model(run, device=device)
        listed = [line for path in paths for line in (_lines() if path == "-" else [path])]
        predictions, left_out = predict_paths(model, listed)
        if not predictions and left_out:
            raise RegraftError(left_out[0].reason)
    if as_json:
        rows = [
            {
                "path": p.path,
                "label": p.label,
                "probability": p.probability,
                "top": [{"label": label, "probability": v} for label, v in p.ranked[:top]],
            }
            for p in predictions
        ]
        _print_json({"predictions": rows, "left_out": [{"path": i.where, "reason": i.reason} for i in left_out]})
    else:
        for p in predictions:
            ranked = "  ".join(f"{printable(label)} {v:.3f}" for label, v in p.ranked[:top])
            click.echo(f"{printable(p.path)}  {ranked}")
        for item in left_out:
            click.echo(f"left out: {item.reason}", err=True)
    if left_out:
        raise SystemExit(1)


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("data")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@_shared
def evaluate(run: Path, data: str, device: str, as_json: bool) -> None:
    """Judge a saved model: accuracy, per-class table, confusion, calibration.

    Uses the test split of DATA if it has one, else all of it.

    \b
    Example:
      regraft evaluate run/ more-labelled-photos/
    """
    from regraft import recipe

    with _errors("nothing was changed"), _progress(as_json) as say:
        document = recipe.evaluate(run, data, device=device, say=say).to_json()
    if as_json:
        _print_json(document)
        return
    click.echo(_tested(document))
    _print_classes(document)
    for item in document["left_out"]:
        click.echo(f"left out: {item['reason']}", err=True)


@main.command()
@click.argument("spec", default="default")
@click.option("--all", "everything", is_flag=True, help="List every cut, not only those shown on a curve.")
@_shared
def inspect(spec: str, everything: bool, as_json: bool) -> None:
    """Show a network: parameters, preprocessing, the cuts.

    \b
    Example:
      regraft inspect resnet50.a1_in1k --all
    """
    from regraft.backbone import load_backbone
    from regraft.inspect import describe

    with _errors("nothing was changed"):
        document = describe(load_backbone(spec))
    if as_json:
        _print_json(document)
        return
    click.echo(f"{document['architecture']}: {document['parameters']:,} parameters, {document['trainable']:,} trainable")
    size = "x".join(map(str, document["preprocess"]["size"]))
    click.echo(f"input {size}, licence of the weights: {document['licence'] or 'not stated'}")
    for cut in document["cuts"]:
        if everything or cut["shown"]:
            shape = "x".join(map(str, cut["shape"]))
            click.echo(f"{cut['depth']:4}  {cut['name']:<32} {cut['layout']:<7} {shape:<14} {cut['parameters']:>12,}")


@main.group()
def cache() -> None:
    """Look after the feature store (the folder in REGRAFT_CACHE).

    \b
    Example:
      regraft cache list
    """


@cache.command("list")
@_shared
def cache_list(as_json: bool) -> None:
    """List what the store holds.

    \b
    Example:
      regraft cache list
    """
    from regraft.store import list_entries, open_store

    with _errors("nothing was changed"):
        store = open_store()
        entries = list_entries(store)
    if as_json:
        rows = [
            {"key": e.digest, "facts": e.facts and dict(e.facts), "pictures": e.pictures, "dim": e.dim, "bytes": e.bytes}
            for e in entries
        ]
        _print_json({"root": str(store.root), "entries": rows, "bytes": sum(e.bytes for e in entries)})
        return
    click.echo(f"{store.root}: {len(entries)} keys, {sum(e.bytes for e in entries) / 1e6:.1f} MB")
    for e in entries:
        what = (e.facts or {}).get("cut") or (e.facts or {}).get("kind") or "?"
        click.echo(f"{e.digest[:12]}  {e.pictures:>8} pictures  {e.dim:>5} values  {e.bytes / 1e6:>9.1f} MB  {what}")


@cache.command("verify")
@_shared
def cache_verify(as_json: bool) -> None:
    """Read every record; set damaged ones aside (they are computed again when needed).

    \b
    Example:
      regraft cache verify
    """
    from regraft.store import open_store, verify

    with _errors("nothing was changed"):
        found = verify(open_store())
    if as_json:
        _print_json({"checked": found.checked, "rows": found.rows, "damaged": [str(p) for p in found.damaged]})
    else:
        click.echo(f"{found.checked} files checked, {found.rows} rows sound, {len(found.damaged)} files damaged")


@cache.command("prune")
@click.option("--max-bytes", type=click.IntRange(0), help="Remove the least recently used until this much is left.")
@click.option("--older-than", type=float, metavar="DAYS", help="Remove what was not used for so many days.")
@_shared
def cache_prune(max_bytes: int | None, older_than: float | None, as_json: bool) -> None:
    """Make room: the least recently used features, and what killed processes left behind.

    \b
    Example:
      regraft cache prune --older-than 30
    """
    from regraft.store import open_store, prune

    with _errors("nothing else was changed"):
        gone = prune(open_store(), max_bytes=max_bytes, older_than=None if older_than is None else older_than * 86400)
    if as_json:
        _print_json({"keys": list(gone.keys), "temporaries": len(gone.temporaries), "bytes": gone.bytes})
    else:
        click.echo(f"removed {len(gone.keys)} keys and {len(gone.temporaries)} leftovers, {gone.bytes / 1e6:.1f} MB")


@contextlib.contextmanager
def _errors(after_interrupt: str) -> Iterator[None]:
    """One sentence on stderr and exit code 1 for what the user can mend; 130 for Ctrl-C, with what is left."""
    debug = bool(click.get_current_context().obj)
    try:
        yield
    except RegraftError as e:
        if debug:
            raise
        click.echo(" ".join(str(e).split()), err=True)
        raise SystemExit(1) from e
    except KeyboardInterrupt as e:
        click.echo(f"interrupted: {after_interrupt}", err=True)
        raise SystemExit(130) from e


@contextlib.contextmanager
def _progress(as_json: bool) -> Iterator[Say]:
    """Progress on stderr when it is a terminal (or REGRAFT_PROGRESS=1), one line that is written over."""
    shown = sys.stderr.isatty() or os.environ.get("REGRAFT_PROGRESS") == "1"
    last = [0.0]

    def say(what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if shown and (done == total or now - last[0] > 0.1):
            last[0] = now
            click.echo(f"\r\033[K{what} {done}/{total}", err=True, nl=done == total)

    yield say


def _lines() -> list[str]:
    names = sys.stdin.buffer.read().split(b"\n")
    return [os.fsdecode(name.rstrip(b"\r")) for name in names if name]


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, allow_nan=False))


def _print_curve(document: dict[str, Any], left_out: list[dict[str, str]]) -> None:
    from regraft.data import printable

    width = max(len(p["name"]) for p in document["cuts"]) + 2
    for point in document["cuts"]:
        bar = "#" * round(40 * point["score"])
        mark = " <" if point["name"] == document["recommended"] else ""
        interval = f"{point['low']:.3f}-{point['high']:.3f}"
        click.echo(f"{point['depth']:3} {point['name']:<{width}} {point['score']:.3f}  {interval}  {bar}{mark}")
    for point in document["several"]:
        mark = " <" if point["name"] == document["recommended"] else ""
        click.echo(f"    {point['name']}  {point['score']:.3f}  {point['low']:.3f}-{point['high']:.3f}{mark}")
    click.echo(f"reuse up to {document['recommended']}: {document['reason']}")
    low, high = document["interval"]
    click.echo(f"expected accuracy on new pictures: {document['score']:.3f} (95 % interval {low:.3f} to {high:.3f})")
    if left_out:
        click.echo(f"{len(left_out)} pictures were left out:", err=True)
        for item in left_out[:20]:
            click.echo(f"  {printable(item['where'])}: {item['reason']}", err=True)


def _tested(document: dict[str, Any]) -> str:
    low, high = document["interval"]
    return (
        f"test accuracy {document['accuracy']:.3f} (95 % interval {low:.3f} to {high:.3f}), balanced "
        f"{document['balanced_accuracy']:.3f}, calibration error {document['calibration_error']:.3f}, "
        f"{document['pictures']} pictures"
    )


def _print_classes(document: dict[str, Any]) -> None:
    from regraft.data import printable

    for row in document["per_class"]:
        recall = "-" if row["recall"] is None else f"{row['recall']:.3f}"
        precision = "-" if row["precision"] is None else f"{row['precision']:.3f}"
        click.echo(f"{printable(row['label']):<24} recall {recall:>5}  precision {precision:>5}  {row['support']:>6} pictures")
