"""The command line: parse, call one function, have it printed. Heavy imports wait until a command runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import click

from regraft.__version__ import __version__
from regraft.console import (
    print_classes,
    print_curve,
    print_framing,
    print_judged,
    print_ladder,
    tell_folds,
    tell_leaks,
    tell_left_out,
    tell_passed_over,
)
from regraft.options import (
    ARCH_TO_PRETRAIN_HELP,
    DEVICES,
    METHOD_HELP,
    SPEC_HELP,
    VIEWS_HELP,
    WEIGHT_OPTIONS,
    learning,
    names_given,
    on_bad_option,
    shared,
    tuning,
    weights,
)
from regraft.printable import printable
from regraft.terminal import lines_of_stdin, print_json, progress, to_stderr

CONTINUES = "what was computed is kept, and the same command continues"
UNCHANGED = "nothing was changed"


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="regraft")
def main() -> None:
    """Reuse the right number of layers of a pretrained network on your own few examples.

    \b
    Example:
      regraft fit photos/ --out run/
      regraft predict run/ new.jpg
    """


@main.command()
@click.argument("data")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory of the run.")
@click.option("--backbone", default="default", show_default=True, metavar="SPEC", help=SPEC_HELP)
@click.option("--test", metavar="DATA", help="Pictures that only the finished model sees.")
@tuning
@weights
@learning
@shared(CONTINUES)
def fit(
    data: str, out: Path, clipping: tuple[Literal["norm", "value"], float], verbose: bool, as_json: bool, **options: Any
) -> None:
    """Do the whole job: curve, choice, final model, report.

    Re-running an interrupted command continues it; a finished run is shown as it is.

    \b
    DATA is a folder of class folders (with or without train/, val/, test/) or a .npz
    file with `images` and `labels`.

    \b
    Example:
      regraft fit photos/ --out run/
    """
    from regraft import nn, recipe

    with progress() as say:
        run = recipe.fit(data, out=out, clipping=nn.Clipping(*clipping), say=say, **options)
    record = run.record
    tested = record["test"] or {"left_out": []}
    tell_left_out([*record["data"]["left_out"], *tested["left_out"]])
    tell_passed_over(record["data"]["ignored"], verbose)
    tell_folds(record["data"]["folds"]["folds"])
    tell_leaks(record["data"]["leaks"])
    if as_json:
        print_json(record)
        return
    print_curve(record["curve"])
    print_framing(record)
    print_ladder(record)
    if record["test"]:
        print_judged(record["test"])
    click.echo(f"report: {run.folder / 'report.html'}")


@main.command()
@click.argument("data")
@click.option("--backbone", "backbones", default=["default"], multiple=True, metavar="SPEC", help=SPEC_HELP)
@click.option("--labels", is_flag=True, help="Also score with fewer labels, to see what more of them would bring.")
@weights
@learning
@shared(CONTINUES)
def curve(
    data: str,
    backbones: tuple[str, ...],
    group: str | None,
    allow_empty_class: bool,
    verbose: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Show how many layers to reuse: the score with its interval at every cut.

    Give --backbone several times to rank several networks; the first line names the winner. Beside a folder that
    `regraft pretrain` made, scratch is its network trained from random weights.

    \b
    Example:
      regraft curve photos/
      regraft curve photos/ --backbone pretrained/ --backbone default --backbone scratch
    """
    from regraft import recipe
    from regraft.data import load_data

    dataset = load_data(data, group=group, allow_empty_class=allow_empty_class)
    for_files: Any = {name: options.pop(name) for name in WEIGHT_OPTIONS}
    with progress() as say:
        found, gate = recipe.compare(
            dataset, backbones, say=say, allow_empty_class=allow_empty_class, weights=for_files, **options
        )
    left_out = [{"where": item.where, "reason": item.reason} for item in found[0].problems]
    ignored = [{"where": item.where, "reason": item.reason} for item in dataset.ignored]
    tell_left_out(left_out)
    tell_passed_over(ignored, verbose)
    tell_folds(int(found[0].task.folds.max()) + 1)
    documents = [one.to_json() for one in found]
    if as_json:
        ranking = [
            {"backbone": d["backbone"]["spec"], "score": d["score"], "interval": d["interval"]} for d in documents
        ]
        rest: dict[str, Any] = {"ranking": ranking, "backbones": documents, "left_out": left_out, "ignored": ignored}
        rest["gate"] = gate.to_json() if len(backbones) > 1 else None
        print_json(documents[0] | rest)
        return
    if len(backbones) > 1:
        click.echo(printable(gate.sentence))
    for document in documents:
        if len(backbones) > 1:
            click.echo(f"\n{document['backbone']['spec']}")
        print_curve(document)


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("paths", nargs=-1, required=True)
@click.option("--top", default=1, show_default=True, type=click.IntRange(1), help="Labels per picture.")
@click.option("--device", type=DEVICES, default="auto", show_default=True)
@on_bad_option
@shared(UNCHANGED)
def predict(run: Path, paths: tuple[str, ...], top: int, device: str, on_bad: str, as_json: bool) -> None:
    """Print labels and probabilities for files, folders, or paths on standard input (-).

    \b
    Example:
      regraft predict run/ new.jpg more-pictures/ --top 3
      find . -name '*.jpg' | regraft predict run/ -
    """
    from regraft.artifact import load_model
    from regraft.predict import predict_paths

    model = load_model(run, device=device)
    listed = [line for path in paths for line in (lines_of_stdin() if path == "-" else [path])]
    predictions, left_out = predict_paths(model, listed)
    bad = [{"where": item.where, "reason": item.reason} for item in left_out]
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
        print_json({"predictions": rows, "left_out": bad})
    else:
        for p in predictions:
            ranked = "  ".join(f"{printable(label)} {v:.3f}" for label, v in p.ranked[:top])
            click.echo(f"{printable(p.path)}  {ranked}")
    _end(bad, on_bad)


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("data")
@click.option("--group", metavar="REGEX", help="As for fit: pictures of one group count together for the interval.")
@click.option("--device", type=DEVICES, default="auto", show_default=True)
@on_bad_option
@shared(UNCHANGED)
def evaluate(run: Path, data: str, group: str | None, device: str, on_bad: str, as_json: bool) -> None:
    """Judge a saved model: accuracy, per-class table, confusion, calibration.

    Uses the test split of DATA if it has one, else all of it.

    \b
    Example:
      regraft evaluate run/ more-labelled-photos/
    """
    from regraft import recipe

    with progress() as say:
        document = recipe.evaluate(run, data, group=group, device=device, say=say).to_json()
    if as_json:
        print_json(document)
    else:
        print_judged(document)
        print_classes(document)
    _end(document["left_out"], on_bad)


@main.command()
@click.argument("spec", default="default")
@click.option("--all", "everything", is_flag=True, help="List every cut, not only those shown on a curve.")
@click.option("--layers", is_flag=True, help="List every layer: output, parameters, trained or frozen, mode.")
@weights
@shared(UNCHANGED)
def inspect(spec: str, everything: bool, layers: bool, as_json: bool, **options: Any) -> None:
    """Show a network: layers, parameters, preprocessing, the cuts.

    SPEC is as for fit --backbone.

    \b
    Example:
      regraft inspect resnet50.a1_in1k --all
      regraft inspect weights.npz --arch resnet18 --layout theano
    """
    from regraft.backbone import load_backbone
    from regraft.inspect import describe
    from regraft.nn import LayerFacts, Summary

    document = describe(load_backbone(spec, **options))
    if as_json:
        print_json(document)
        return
    click.echo(
        f"{document['architecture']}: {document['parameters']:,} parameters, {document['trainable']:,} trainable"
    )
    size = "x".join(map(str, document["preprocess"]["size"]))
    click.echo(f"input {size}, licence of the weights: {document['licence'] or 'not stated'}")
    if layers:
        click.echo(Summary(tuple(LayerFacts(**layer) for layer in document["layers"])))
    for cut in document["cuts"]:
        if everything or cut["shown"]:
            shape = "x".join(map(str, cut["shape"]))
            click.echo(f"{cut['depth']:4}  {cut['name']:<32} {cut['layout']:<7} {shape:<14} {cut['parameters']:>12,}")


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--data", help="Pictures to examine on, instead of the run's own.")
@shared(UNCHANGED)
def doctor(run: Path, data: str | None, as_json: bool) -> None:
    """Show the health of the layers of a run: vanishing, exploding, dead, saturated, and what to try.

    The report of the run shows it from then on.

    \b
    Example:
      regraft doctor run/
    """
    from regraft import recipe

    with progress() as say:
        health = recipe.doctor(run, data, say=say)
    if as_json:
        print_json(health.to_json())
    else:
        click.echo(health)


@main.command()
@click.argument("data")
@click.option("--method", required=True, metavar="NAME", help=METHOD_HELP)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory of the run and of the backbone.")
@click.option("--arch", metavar="SPEC", help=ARCH_TO_PRETRAIN_HELP)
@click.option("--from", "start", metavar="SPEC", help="A backbone to go on from, instead of random weights.")
@click.option("--labelled", metavar="DATA", help="Labelled pictures: the curve on them is drawn before and after.")
@click.option("--group", metavar="REGEX", help="For pairs: pictures with the same first bracket show the same thing.")
@click.option("--size", type=click.IntRange(8, 1024), help="Height and width of pictures, for small and dense.")
@click.option("--budget", default="20m", show_default=True, metavar="TIME", help="Wall time of the whole run.")
@click.option("--epochs", type=click.IntRange(1), help="Exactly so many epochs, instead of a budget.")
@click.option("--batch", type=click.IntRange(4), help="Pictures of a step; by default what suits method and memory.")
@click.option("--augment", metavar="NAMES", callback=names_given, help=VIEWS_HELP)
@click.option("--device", type=DEVICES, default="auto", show_default=True)
@click.option("--seed", default=0, show_default=True)
@shared(CONTINUES)
def pretrain(data: str, out: Path, as_json: bool, **options: Any) -> None:
    """Pretrain a network on pictures without labels, when no similar one exists.

    The folder is a backbone like any other: give it to --backbone. Whether it paid, `regraft curve` says.

    \b
    DATA is any folder of pictures, or a .npz file with `images`; for pairs and labels
    as for fit.

    \b
    Example:
      regraft pretrain unlabelled/ --method contrastive --out pretrained/
      regraft curve photos/ --backbone pretrained/ --backbone default --backbone scratch
    """
    from regraft.pretraining import pretrain as run_pretrain

    with progress() as say:
        done = run_pretrain(data, out=out, say=say, **options)
    record = done.record
    tell_left_out(record["left_out"])
    if as_json:
        print_json(record)
        return
    click.echo(
        f"{record['options']['method']}: {len(record['losses'])} epochs on {record['pictures']:,} pictures, loss "
        f"{record['losses'][0]:.4f} to {record['losses'][-1]:.4f}, {record['seconds']['total']:.0f} s"
    )
    for name, document in record["curves"].items():
        click.echo(f"\n{name}")
        print_curve(document)
    click.echo(f"backbone: {printable(str(done.folder))}, trained up to {record['cut']}")
    click.echo(f"report: {done.folder / 'report.html'}")


@main.group()
def cache() -> None:
    """Look after the feature store (the folder in REGRAFT_CACHE).

    \b
    Example:
      regraft cache list
    """


@cache.command("list")
@shared(UNCHANGED)
def cache_list(as_json: bool) -> None:
    """List what the store holds.

    \b
    Example:
      regraft cache list
    """
    from regraft.store import list_entries, open_store

    store = open_store()
    entries = list_entries(store)
    if as_json:
        rows = [
            {
                "key": e.digest,
                "facts": e.facts and dict(e.facts),
                "pictures": e.pictures,
                "dim": e.dim,
                "bytes": e.bytes,
            }
            for e in entries
        ]
        print_json({"root": str(store.root), "entries": rows, "bytes": sum(e.bytes for e in entries)})
        return
    click.echo(f"{printable(str(store.root))}: {len(entries)} keys, {sum(e.bytes for e in entries) / 1e6:.1f} MB")
    for e in entries:
        facts = e.facts or {}
        what = printable(str(facts.get("cut") or facts.get("kind") or "?"))
        click.echo(f"{e.digest[:12]}  {e.pictures:>8} pictures  {e.dim:>5} values  {e.bytes / 1e6:>9.1f} MB  {what}")


@cache.command("verify")
@shared("what was checked stays as it is")
def cache_verify(as_json: bool) -> None:
    """Read every record; set damaged ones aside (they are computed again when needed).

    \b
    Example:
      regraft cache verify
    """
    from regraft.store import open_store, verify

    found = verify(open_store())
    if as_json:
        print_json({"checked": found.checked, "rows": found.rows, "damaged": [str(p) for p in found.damaged]})
    else:
        click.echo(f"{found.checked} files checked, {found.rows} rows sound, {len(found.damaged)} files damaged")


@cache.command("prune")
@click.option("--max-bytes", type=click.IntRange(0), help="Remove the least recently used until this much is left.")
@click.option(
    "--older-than", type=click.FloatRange(0), metavar="DAYS", help="Remove what was not used for so many days."
)
@shared("what was removed is gone, the rest is whole")
def cache_prune(max_bytes: int | None, older_than: float | None, as_json: bool) -> None:
    """Make room: the least recently used features, and what killed processes left behind.

    \b
    Example:
      regraft cache prune --older-than 30
    """
    from regraft.store import open_store, prune

    gone = prune(open_store(), max_bytes=max_bytes, older_than=None if older_than is None else older_than * 86400)
    if as_json:
        print_json({"keys": list(gone.keys), "temporaries": len(gone.temporaries), "bytes": gone.bytes})
    else:
        click.echo(f"removed {len(gone.keys)} keys and {len(gone.temporaries)} leftovers, {gone.bytes / 1e6:.1f} MB")


def _end(bad: Sequence[dict[str, str]], on_bad: str) -> None:
    """Name what could not be read; exit with 1 unless that is to be skipped."""
    if len(bad) == 1 and on_bad == "fail":
        to_stderr(bad[0]["reason"])
    elif bad:
        tell_left_out(bad)
    if bad and on_bad == "fail":
        raise SystemExit(1)
