"""Prometheus metrics. Names follow vLLM's under our own prefix, for the dashboards there are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.engine_port import EnginePort
from server.watchdog import Progress, progress, stuck_after_s
from sl_serve.core import TokenOut
from sl_serve.stats import EngineState, StepStats

PREFIX = "sl_serve_"

# steps of an offloaded model last from milliseconds to minutes
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280, 2560)
COUNTS = tuple(2**i for i in range(17))


@dataclass(slots=True)
class _ChoiceTimes:
    """time.monotonic() of one choice's first and latest token."""

    first_s: float = 0.0
    latest_s: float = 0.0
    n_tokens: int = 0


# field of EngineSnapshot -> (name, help); counters end in _total
ENGINE_METRICS = {
    "n_running": ("num_requests_running", "Requests in the batch"),
    "n_waiting": ("num_requests_waiting", "Requests in the queue"),
    "waiting_tokens": ("num_tokens_waiting", "Their tokens, without those of batch jobs"),
    "kv_used_bytes": ("kv_cache_used_bytes", "KV memory in use"),
    "kv_total_bytes": ("kv_cache_total_bytes", "KV memory there is"),
    "since_progress_s": ("since_progress_seconds", "Since the last step ended"),
    "prompt_tokens_total": ("prompt_tokens_total", "Prompt tokens computed"),
    "generated_tokens_total": ("generation_tokens_total", "Tokens generated"),
    "n_parked_total": (
        "num_preemptions_total",
        "Rows parked for want of KV memory or for better ones",
    ),
    "n_steps": ("engine_steps_total", "Steps done"),
    "n_short_of_memory": ("step_retries_total", "Steps repeated smaller: memory ran short"),
    "slow_step_s": ("slow_step_seconds", "99 of 100 of the latest steps were not slower"),
}


class _EngineCollector(Collector):
    """Reads the engine's own totals at the moment of the scrape."""

    def __init__(self, engine: EnginePort, stall_floor_s: float) -> None:
        self._engine = engine
        self._stall_floor_s = stall_floor_s

    def collect(self) -> Iterator[Metric]:
        snapshot = self._engine.snapshot()
        for attribute, (name, text) in ENGINE_METRICS.items():
            family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            yield family(PREFIX + name, text, value=getattr(snapshot, attribute))
        usage = snapshot.kv_used_bytes / snapshot.kv_total_bytes if snapshot.kv_total_bytes else 0.0
        yield GaugeMetricFamily(
            PREFIX + "kv_cache_usage_perc", "Share of KV memory in use, 0 to 1", value=usage
        )
        alive = snapshot.state in (EngineState.RUNNING, EngineState.DRAINING)
        yield GaugeMetricFamily(PREFIX + "engine_up", "1 while the engine works", value=alive)
        stuck = progress(snapshot, self._stall_floor_s) is not Progress.STEADY
        yield GaugeMetricFamily(
            PREFIX + "engine_stuck", "1 while rows run and no step ends", value=stuck
        )
        yield GaugeMetricFamily(
            PREFIX + "stuck_after_seconds",
            "Since the last step ended, to count as stuck",
            value=stuck_after_s(snapshot, self._stall_floor_s),
        )


class ServerMetrics:
    """One registry per app, so that several apps may live in one process."""

    def __init__(self, engine: EnginePort, stall_floor_s: float) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(engine, stall_floor_s))
        self._define_request_metrics()
        self._define_step_metrics()
        engine.on_step(self._step)

    def render(self) -> bytes:
        return generate_latest(self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(PREFIX + name, text, buckets=buckets, registry=self.registry)

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(PREFIX + name, text, labels, registry=self.registry)

    def _define_request_metrics(self) -> None:
        seconds = SECONDS
        self._ttft = self._histogram(
            "time_to_first_token_seconds", "Submission to first token", seconds
        )
        self._gap = self._histogram("inter_token_latency_seconds", "Between two tokens", seconds)
        self._per_token = self._histogram(
            "request_time_per_output_token_seconds", "Mean of one answer after its first", seconds
        )
        self._decode = self._histogram(
            "request_decode_time_seconds", "First to last token", seconds
        )
        self._e2e = self._histogram("e2e_request_latency_seconds", "Submission to end", seconds)
        self._finished = self._counter(
            "request_success_total", "Answers ended, by reason", ("finished_reason",)
        )
        self._http = self._counter("http_requests_total", "HTTP answers", ("route", "status"))
        self._http_seconds = self._histogram("http_request_seconds", "HTTP answers", seconds)

    def _define_step_metrics(self) -> None:
        self._step_seconds = self._histogram("step_seconds", "One sweep over the layers", SECONDS)
        self._step_tokens = self._histogram(
            "iteration_tokens_total", "Tokens computed in one step", COUNTS
        )
        self._step_rows = self._histogram("step_rows", "Rows in one step", COUNTS)
        self._step_sub_batches = self._histogram("step_sub_batches", "Sub-batches in one", COUNTS)
        self._stalls = self._counter("stall_seconds_total", "Compute waiting for copies")
        self._down = self._counter("host_to_device_bytes_total", "Over the link", ("kind",))
        self._up = self._counter("device_to_host_bytes_total", "Over the link", ("kind",))

    def _step(self, stats: StepStats) -> None:
        """On the engine thread; microseconds."""
        self._step_seconds.observe(stats.wall_s)
        self._step_tokens.observe(stats.n_prefill_tokens + stats.n_decode_tokens)
        self._step_rows.observe(stats.n_rows)
        self._step_sub_batches.observe(stats.n_sub_batches)
        self._stalls.inc(stats.stall_s)
        self._down.labels("weights").inc(stats.weight_bytes)
        self._down.labels("kv").inc(stats.kv_down_bytes)
        self._up.labels("kv").inc(stats.kv_up_bytes)

    def answered(self, route: str, status: int, seconds: float) -> None:
        self._http.labels(route, str(status)).inc()
        self._http_seconds.observe(seconds)

    def watch(self, n_choices: int, now_s: float) -> Callable[[int, TokenOut, float], None]:
        """An observer of one job's news, submitted at `now_s` (time.monotonic())."""
        times = [_ChoiceTimes() for _ in range(n_choices)]
        return lambda index, out, s: self._news(times[index], out, now_s, s)

    def _news(self, times: _ChoiceTimes, out: TokenOut, start_s: float, now_s: float) -> None:
        if out.token_ids and times.n_tokens == 0:
            times.first_s = now_s
            self._ttft.observe(now_s - start_s)
        elif out.token_ids:
            self._gap.observe(now_s - times.latest_s)
        if out.token_ids:
            times.n_tokens += len(out.token_ids)
            times.latest_s = now_s
        if out.finish_reason is not None:
            self._finished.labels(out.finish_reason.value).inc()
            self._e2e.observe(now_s - start_s)
        if out.finish_reason is not None and times.n_tokens > 1:
            self._decode.observe(now_s - times.first_s)
            self._per_token.observe((now_s - times.first_s) / (times.n_tokens - 1))
