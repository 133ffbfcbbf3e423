"""Profiles as timelines: spans of made traces, by hand."""

import gzip
import json

import pytest

from benchmarks.timeline import draw, middle_part, overlap, read_spans
from sparda_jax.checks import ConfigError
from sparda_jax.evaluation import plots


def _trace(folder, process, threads, events):
    """Writes what a profile would be; events are (thread, name, begin, took)."""
    told = [
        {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": process}},
        *(
            {"ph": "M", "pid": 1, "tid": n, "name": "thread_name", "args": {"name": t}}
            for n, t in enumerate(threads)
        ),
        *(
            {"ph": "X", "pid": 1, "tid": thread, "name": name, "ts": begin, "dur": took}
            for thread, name, begin, took in events
        ),
    ]
    place = folder / "plugins" / "profile" / "now"
    place.mkdir(parents=True)
    text = json.dumps({"traceEvents": told}).encode()
    (place / "vm.trace.json.gz").write_bytes(gzip.compress(text))


def test_a_fetch_beside_a_kernel_on_streams(tmp_path):
    _trace(
        tmp_path,
        "/device:GPU:0",
        ["Stream #1(Compute)", "Stream #2(Compute)", "python"],
        [
            (0, "gemm_1", 0.0, 10.0),
            (0, "gemm_2", 10.0, 10.0),
            (1, "host_gather_3", 15.0, 20.0),
            (2, "host_gather in Python", 0.0, 100.0),
        ],
    )
    spans = read_spans(tmp_path)
    assert [span.name for span in spans] == ["gemm_1", "gemm_2", "host_gather_3"]
    assert overlap(spans) == (20.0, 5.0)
    assert [span.name for span in middle_part(spans, 12.0)] == [
        "gemm_2",
        "host_gather_3",
    ]
    if plots.available():
        picture = plots.png(lambda figure: draw(figure, spans))
        assert picture == plots.png(lambda figure: draw(figure, spans))
        assert picture.startswith(b"\x89PNG")


def test_threads_of_a_cpu(tmp_path):
    _trace(
        tmp_path,
        "/host:CPU",
        ["python", "tf_XLAExecute/1", "tf_XLAEigen/2"],
        [
            (0, "generate", 0.0, 90.0),
            (1, "while.3", 0.0, 50.0),
            (1, "ThunkExecutor::Execute", 0.0, 50.0),
            (1, "end: copy.3", 5.0, 1.0),
            (1, "copy.3", 0.0, 4.0),
            (1, "select_gather_fusion.1", 4.0, 4.0),
            (2, "dot.7", 2.0, 4.0),
        ],
    )
    spans = read_spans(tmp_path)
    assert [(s.name, s.fetch) for s in spans] == [
        ("copy.3", True),
        ("dot.7", False),
        ("select_gather_fusion.1", True),
    ]
    assert overlap(spans) == (8.0, 4.0)
    assert len({span.lane for span in spans}) == 2


def test_a_folder_without_a_profile_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no profile"):
        read_spans(tmp_path)
