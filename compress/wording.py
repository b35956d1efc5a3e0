"""A result's figures as people read them: in the terminal's table and on the page alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NONE = "-"
COLUMNS = ("step", "top-1 %", "vs base", "params", "MACs", "file bytes", "latency ms", "time")


def title(result: Mapping[str, Any]) -> str:
    """What was run, in a line."""
    factory = str(result["model"]["factory"] or "model").rpartition(".")[2]
    return f"{result['recipe']}: {factory} on {result['data']['name']}, seed {result['seed']}, {result['target']}"


def cells(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """One tuple of short texts for each row, in the order of `COLUMNS`."""
    return [
        (
            str(row["name"]),
            accuracy_text(row.get("accuracy")),
            difference_text(row.get("paired")),
            params_text(row),
            ("at least " if row.get("uncounted") else "") + short(row.get("macs")),
            exact(row.get("bytes")),
            latency_text(row.get("latency")),
            "stored" if row.get("cached") else seconds_text(row.get("seconds")),
        )
        for row in rows
    ]


def remarks(result: Mapping[str, Any]) -> list[str]:
    """What the table alone would not tell: what was kept and why, the files, caveats."""
    lines = []
    counted = None
    for row in result["rows"]:
        kept = [site for site in row.get("sites") or [] if site.get("after") is None]
        if row.get("sites"):
            lines.append(f"{row['name']}: {len(row['sites']) - len(kept)} layers changed, {len(kept)} kept")
            lines += [f"  kept {names}: {why}" for why, names in reasons(kept).items()]
        if row.get("displacements") and row["displacements"] != counted:
            counted = row["displacements"]
            lines.append(f"{row['name']}: {displacements_text(counted)}")
        if row.get("uncounted"):
            lines.append(f"{row['name']}: work not counted in {', '.join(row['uncounted'])}")
    if result.get("val_seen"):
        lines.append("val seen by the base: accuracy on val says nothing here; decisions used the base's logits.")
    if result.get("checkpoint"):
        lines.append(f"{file_text(result['checkpoint'])}  {result['checkpoint'].get('load') or ''}".rstrip())
        lines += [f"  {remark}" for remark in [result["checkpoint"].get("remark")] if remark]
    if result.get("failure"):
        lines.append(f"not finished: {result['failure']}")
    for export in result.get("exports") or []:
        lines.append(f"{file_text(export)}  {parity_text(export.get('parity'))}")
        in_float = export.get("float_layers") or {}
        lines += [f"  in float: {name or '(the model itself)'}: {why}" for name, why in in_float.items()]
        lines += [f"  form {line}" for line in forms_text(export.get("forms"))]
        lines += [f"  {line}" for line in filling_text(export.get("filling"))]
    return lines


def forms_text(forms: Mapping[str, Mapping[str, Any]] | None) -> list[str]:
    """The forms that were measured, each with its layers: "depthwise (dense 0.31 ms, depthwise 0.22 ms): conv1"."""
    layers: dict[str, list[str]] = {}
    for name, choice in (forms or {}).items():
        if choice["ms"]:
            times = ", ".join(f"{form} {ms:.3g} ms" for form, ms in choice["ms"].items())
            layers.setdefault(f"{choice['form']} ({times})", []).append(name or "(the model itself)")
    return [f"{figures}: {', '.join(names)}" for figures, names in layers.items()]


def filling_text(filling: Mapping[str, Any] | None) -> list[str]:
    """What became of channels that can be filled up: "channels filled with zeros (as they are 1.45 ms, ...): conv1"."""
    if not filling:
        return []
    times = ", ".join(f"{form} {ms:.3g} ms" for form, ms in filling["ms"].items())
    return [f"channels {filling['form']} ({times} for all the network): {', '.join(filling['layers'])}"]


def reasons(kept: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The reasons for which layers were kept, each with their names (three, and how many more)."""
    by_reason: dict[str, list[str]] = {}
    for site in kept:
        by_reason.setdefault(site.get("why") or "no reason given", []).append(site["name"] or "(the model itself)")
    return {
        why: ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        for why, names in by_reason.items()
    }


def accuracy_text(accuracy: Mapping[str, Any] | None) -> str:
    """ "91.73 ±0.54": half the width of the 95 % interval, which is not quite symmetric."""
    return NONE if not accuracy else f"{accuracy['top1']:.2f} ±{(accuracy['high'] - accuracy['low']) / 2:.2f}"


def difference_text(paired: Mapping[str, Any] | None) -> str:
    """ "-0.53 ±0.31" points, as the paired test has it."""
    return NONE if not paired else f"{paired['difference']:+.2f} ±{(paired['high'] - paired['low']) / 2:.2f}"


def params_text(row: Mapping[str, Any]) -> str:
    """ "269.7k", or "66.1k/269.7k" where more than 2 % of them are zero."""
    params, nonzero = row.get("params"), row.get("nonzero")
    sparse = params is not None and nonzero is not None and nonzero < 0.98 * params
    return f"{short(nonzero)}/{short(params)}" if sparse else short(params)


def displacements_text(counts: Mapping[str, int]) -> str:
    """ "61.2 % of 2,496 displacements are zero (312 copies without weight among them)"."""
    text = f"{zeros_text(counts)} of {counts['all']:,} displacements are zero"
    return text + (f" ({counts['empty']:,} copies without weight among them)" if counts["empty"] else "")


def zeros_text(counts: Mapping[str, int] | None) -> str:
    """ "61.2 %": the share of zero displacements."""
    return NONE if not counts else f"{100 * counts['zero'] / counts['all']:.1f} %"


def latency_text(latency: Mapping[str, Any] | None) -> str:
    """ "0.61 (0.58x)": the median, and what part of the base's time that is."""
    return NONE if not latency else f"{latency['p50_ms']:.3g} ({latency['ratio']:.2f}x)"


def parity_text(parity: Sequence[Mapping[str, Any]] | None) -> str:
    """How far an export is from the torch model, over all batch sizes tried."""
    if not parity:
        return "not compared with the torch model"
    worst = [p["max_abs"] for p in parity if p.get("max_abs") is not None]
    agreement = [p["top1_agreement"] for p in parity if p.get("top1_agreement") is not None]
    batches = ", ".join(str(p["batch"]) for p in parity)
    parts = [f"batch {batches}: differs from torch by at most {max(worst):.2g}" if worst else f"batch {batches}"]
    return ", ".join(parts + [f"top-1 agreement at least {percent(min(agreement))}"] * bool(agreement))


def file_text(entry: Mapping[str, Any]) -> str:
    return f"{entry['file']}  {exact(entry.get('bytes'))} bytes"


def percent(share: float) -> str:
    """A share between 0 and 1 in percent: "99.95 %"."""
    return f"{100 * share:.4g} %"


def exact(count: int | None) -> str:
    return NONE if count is None else f"{count:,}"


def short(count: float | None) -> str:
    """Three or four digits with a unit: 269722 -> "269.7k"."""
    if count is None:
        return NONE
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return f"{count:g}"


def seconds_text(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
