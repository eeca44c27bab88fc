"""`pipeline doctor`: what is installed, found and missing, and what to do about it."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial

from rich.text import Text

from pipeline.doctor.data import check_cache, check_data
from pipeline.doctor.findings import Finding
from pipeline.doctor.machine import check_devices, check_disk, check_downloads, check_versions, check_weights
from pipeline.screen.console import emit_json, print_answer
from pipeline.settings.config import PipelineConfig, Resolved
from stages.errors import UserError
from stages.wording import counted

_Check = Callable[[PipelineConfig], Iterator[Finding]]
_MACHINE: dict[str, _Check] = {
    "versions": check_versions,
    "devices": check_devices,
    "disk": check_disk,
    "weights": check_weights,
    "downloads": check_downloads,
}
_STYLES = {"ok": "green", "missing": "yellow", "problem": "red"}


def run(resolved: Resolved, *, as_json: bool, quick: bool) -> bool:
    """Look at everything that the configuration needs, print one line for each thing, return whether all is in place.

    What an extraction makes is not needed before it, so a cache that is not there yet does not count. Scripts read the
    status of each line with `as_json`: a list of objects with section, item, status, detail, fix, names and needed.
    `quick` leaves out the lengths of the videos, for which every file is opened.
    """
    sections: dict[str, _Check] = {**_MACHINE, "data": partial(check_data, quick=quick)}
    sections["cache"] = partial(check_cache, quick=quick)
    findings = [finding for name, check in sections.items() for finding in _examine(name, check, resolved.config)]
    if as_json:
        emit_json([asdict(finding) for finding in findings])
    else:
        _show(findings)
    return all(finding.status == "ok" for finding in findings if finding.needed)


def _examine(section: str, check: _Check, config: PipelineConfig) -> Iterator[Finding]:
    try:
        yield from check(config)
    except UserError as error:
        yield Finding(section, "check", "problem", str(error), "mend this, then run `pipeline doctor` again")
    except Exception as error:  # noqa: BLE001  # whatever stops a check is what the doctor is asked about
        fix = "if the lines above do not explain it, report it as a bug"
        yield Finding(section, "check", "problem", f"{type(error).__name__}: {error}", fix)


def _show(findings: list[Finding]) -> None:
    explained: set[str] = set()
    for section in dict.fromkeys(finding.section for finding in findings):
        print_answer(Text(section, style="bold"))
        mine = [finding for finding in findings if finding.section == section]
        if section == "versions":
            # Two dozen packages that are as they should be need one line.
            fitting = ", ".join(f"{finding.item} {finding.detail}" for finding in mine if finding.status == "ok")
            _show_line("ok", fitting)
            mine = [finding for finding in mine if finding.status != "ok"]
        for finding in mine:
            _show_line(finding.status, f"{finding.item}: {finding.detail}")
            if finding.fix is not None:
                fix = "as above" if finding.fix in explained else finding.fix
                explained.add(finding.fix)
                print_answer(f"           -> {fix}")
    counts = Counter(finding.status for finding in findings if finding.status != "ok")
    plurals = {"missing": "missing", "problem": "problems"}
    summary = ", ".join(counted(count, status, plurals[status]) for status, count in counts.items())
    print_answer(f"not in place: {summary}" if counts else "everything is in place")


def _show_line(status: str, text: str) -> None:
    print_answer(Text.assemble((f"  {status:<9}", _STYLES[status]), text))
