"""Work on several sites at a time: in order, all or nothing, and torch keeps its threads."""

import threading
import time

import pytest
import torch

import compresskit
from compresskit.surgery import parallel
from compresskit.surgery.parallel import LAST, MAX_WORKERS, map_in_threads
from tests.models import build

CPU = torch.device("cpu")


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    """So many threads for torch, which has them again afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    assert torch.get_num_threads() == request.param
    torch.set_num_threads(before)


def test_results_and_reports_are_in_the_order_of_the_items(threads):
    gate = threading.Event()
    done = []

    def work(item):
        if item == 0 and threads > 1:
            assert gate.wait(10)  # the first item ends last
        gate.set()
        return item * item

    def report(result):
        assert threading.current_thread() is threading.main_thread()
        done.append(result)

    assert map_in_threads(work, range(9), device=CPU, on_done=report) == [n * n for n in range(9)]
    assert done == [n * n for n in range(9)]


def test_as_many_at_a_time_as_there_are_threads(threads):
    inside = threading.Barrier(threads)

    def work(_):
        inside.wait(10)  # passed only if all stand here at once
        return torch.get_num_threads()

    assert map_in_threads(work, range(2 * threads), device=CPU, on_done=lambda _: None) == [1] * (2 * threads)


def test_few_items_share_the_threads_and_many_threads_have_few_workers():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert map_in_threads(lambda _: torch.get_num_threads(), [1, 2], device=CPU, on_done=id) == [2, 2]
        torch.set_num_threads(3 * MAX_WORKERS)
        counts = map_in_threads(lambda _: torch.get_num_threads(), range(50), device=CPU, on_done=id)
        assert counts == [3] * 50
    finally:
        torch.set_num_threads(before)


def test_on_a_gpu_one_at_a_time(threads):
    names = map_in_threads(
        lambda _: threading.current_thread(), range(3), device=torch.device("cuda"), on_done=lambda _: None
    )
    assert set(names) == {threading.main_thread()}


def test_the_last_ones_begin_in_falling_order_of_their_size(threads, monkeypatch):
    begun = []

    class Pool(parallel.ThreadPoolExecutor):
        def submit(self, function, item):
            begun.append(item)
            return super().submit(function, item)

    monkeypatch.setattr(parallel, "ThreadPoolExecutor", Pool)
    sizes = [*range(40), 3, 9, 1]
    assert map_in_threads(lambda item: item, sizes, device=CPU, on_done=lambda _: None, size=float) == sizes
    last = LAST * threads
    assert begun == ([*sizes[:-last], *sorted(sizes[-last:], reverse=True)] if threads > 1 else [])


@pytest.mark.parametrize("where", ["work", "report"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_stops_what_has_not_begun(threads, where, error):
    begun, others = [], set(threading.enumerate())  # a pool of something that ran before us may idle on

    def work(item):
        begun.append(item)
        if where == "work" and item == 2:
            raise error("enough")
        time.sleep(0.001)  # all of them: seconds, which this thread has to be told in
        return item

    def report(item):
        if where == "report" and item == 2:
            raise error("enough")

    with pytest.raises(error, match="enough"):
        map_in_threads(work, range(10_000), device=CPU, on_done=report)
    assert len(begun) < 10_000
    assert set(threading.enumerate()) <= others


@pytest.mark.parametrize("method", compresskit.methods())
def test_any_number_of_threads_gives_the_same_model(method):
    """The same structures and errors: libraries of linear algebra round differently with other numbers of threads."""
    reports = []
    before = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            reports.append(compresskit.compress(build("bert"), method, ratio=3))
    finally:
        torch.set_num_threads(before)
    one, three = ([(site.name, site.structure) for site in report.sites] for report in reports)
    assert one == three
    errors = [[site.relative_error for site in report.sites] for report in reports]
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)
