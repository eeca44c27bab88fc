"""`pipeline predict`: one video file, one question, no cache; frames stream through the memory."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.vision import VisionEncoder
from pipeline.runs.models import LoadedModel, is_exported, open_exported, open_run, require_room, warn_of_long_questions
from pipeline.runs.small_world import warn_of_unknown_video
from pipeline.screen.console import emit_json, print_answer, say
from pipeline.settings.config import PipelineConfig
from stages.data.card_schema import FrameRule
from stages.data.manifest import even_times_s
from stages.decode import DecodeChild, DecodedVideo, DecodeError, FrameRequest, LengthRequest
from stages.device import autocast, move
from stages.errors import UserError
from stages.evaluate.answering import Asked, Scored, rank_answers
from stages.evaluate.scoring import METHODS
from stages.frozen.load import load_encoder
from stages.wording import counted

_FRAMES_AT_ONCE = 16


def run(
    video: Path,
    question: str,
    source: str,
    *,
    start_s: float,
    method: str,
    task: str | None,
    overrides: list[str],
    as_json: bool,
) -> None:
    """Answer the question and print the answer, the other beams or candidates, and the seconds it took.

    Args:
        source: folder of the run; folder or hub id of the exported model.
        start_s: where the window begins, in seconds.
        method: generate, or rank: the labels of the task.
        task: whose labels; None: as `About.candidates` finds it.
    """
    if method not in METHODS:
        raise UserError("unknown method", where="--method", received=method, allowed=", ".join(METHODS))
    if task is not None and method != "rank":
        raise UserError("only a ranking needs to know the task", where="--task", hint="add --method rank")
    finished = open_exported(source, overrides) if is_exported(source) else open_run(Path(source), overrides)
    config, about = finished.config, finished.about
    candidates = about.candidates(question, task) if method == "rank" else None
    looking = time.perf_counter()
    rule = about.card.frame_rule
    with DecodeChild(memory_gb=config.extract.memory_gb) as child:
        times_s = _frame_times(child, video, rule, start_s, config)
        loading = time.perf_counter()
        encoder = load_encoder(config.encoder)
        loaded = finished.load(encoder.width)
        encoder.to(loaded.compute.device, loaded.compute.dtype)
        started = time.perf_counter()
        decoded = _decode(child, video, times_s, encoder.size_px, rule, config)
    frames, remark = decoded.views[0], decoded.remark
    asked, template = about.prompt(question)
    warn_of_long_questions(loaded.tokenizers, [(asked, template)])
    prompt = loaded.tokenizers.fitted(asked, template)
    answers, scores = _answer(loaded, encoder, frames, prompt, config, candidates)
    seconds = time.perf_counter() - started + loading - looking
    result = {
        "video": str(video),
        "question": question,
        "method": method,
        "answer": answers[0],
        "answers": answers,
        "log_probability": scores,
        "from_s": float(times_s[0]),
        "to_s": float(times_s[-1]),
        "frames": len(times_s),
        "seconds": round(seconds, 3),
        "loading_seconds": round(started - loading, 3),
        "remark": remark,
    }
    if as_json:
        emit_json(result)
    else:
        _show(result)
    warn_of_unknown_video(config)


def _show(result: dict[str, Any]) -> None:
    print_answer(result["answer"])
    spent = f"{result['seconds']:.2f} s, and {result['loading_seconds']:.2f} s to load"
    frames = counted(result["frames"], "frame")
    say(f"{frames} from {result['from_s']:g} s to {result['to_s']:g} s; {spent}")
    if result["remark"]:
        say(f"{result['video']}: {result['remark']}")
    scores = result["log_probability"]
    for answer, score in list(zip(result["answers"], scores, strict=True))[1:]:
        say(f"  also {answer!r} ({score - scores[0]:+.2f} in log-probability)")


def _frame_times(
    child: DecodeChild, video: Path, rule: FrameRule, start_s: float, config: PipelineConfig
) -> np.ndarray:
    """Times of the window that begins at `start_s`, by the rule that the run's data set samples frames by."""
    with _refusing(video):
        asked = LengthRequest(video, damaged=config.extract.damaged, clock_fps=rule.index_fps)
        length = child.length(asked, config.extract.deadline_s)
    if not 0 <= start_s < length.seconds:
        raise UserError(
            "the window begins outside the video",
            where="--start",
            received=start_s,
            allowed=f"0 to {length.seconds:.2f}",
            hint=length.remark,
        )
    first_s, last_s = rule.spans(start_s, length.seconds, rule.indexed_frames(length.seconds))[0]
    require_room(config, rule.num_frames)
    return even_times_s(first_s, last_s, rule.num_frames, rule.index_fps, rule.frame_offset)


def _decode(
    child: DecodeChild, video: Path, times_s: np.ndarray, size_px: int, rule: FrameRule, config: PipelineConfig
) -> DecodedVideo:
    """Frames [T, S, S, 3] uint8 of the window."""
    extract = config.extract
    request = FrameRequest(
        path=video,
        times_s=times_s,
        sizes_px=((size_px, size_px),),
        decoder=extract.decoder,
        tolerance_s=extract.tolerance_s,
        damaged=extract.damaged,
        clock_fps=rule.index_fps,
    )
    with _refusing(video):
        return child.decode(request, extract.deadline_s)


@contextmanager
def _refusing(video: Path) -> Iterator[None]:
    try:
        yield
    except DecodeError as error:
        raise UserError(f"cannot be decoded ({error.kind}): {error.reason}", where=video) from error


def _answer(
    loaded: LoadedModel,
    encoder: VisionEncoder,
    frames: np.ndarray,
    prompt: str,
    config: PipelineConfig,
    candidates: tuple[str, ...] | None,
) -> Scored:
    """Stream the frames through encoder and memory, one batch at a time, then ask the language model.

    It ranks the candidates, if there are some, and else generates.
    """
    model, compute = loaded.model.eval(), loaded.compute
    question = move(loaded.tokenizers.question([prompt]), compute.device)
    memory, queries = None, None
    with autocast(compute.device, compute.dtype):
        for start in range(0, len(frames), _FRAMES_AT_ONCE):
            pictures = torch.from_numpy(frames[start : start + _FRAMES_AT_ONCE]).to(compute.device)
            queries, memory = model.watch(encoder(pictures)[None], question, memory)
        assert queries is not None
        ids, mask = loaded.tokenizers.prompts([prompt])
        asked = Asked(queries, ids.to(compute.device), mask.to(compute.device))
        if candidates is not None:
            return rank_answers(model.language, asked, candidates, loaded.tokenizers, config.evaluate)[0]
        found = model.language.generate(asked.queries, asked.prompt, asked.mask, config.language)
    return tuple(loaded.tokenizers.decode(found.ids)[0]), tuple(found.log_probability[0].tolist())
