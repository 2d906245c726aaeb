"""Requests and finetuning by turns in one thread, as a user of transformers and PEFT would write it today.

Requests that wait are answered in static padded batches; while none waits, an adapter is trained. Both want all
processors, so they take turns. There are two natural policies:

- ``serve-first`` trains only while no request waits, and looks for requests after every backward;
- ``alternate`` owes a whole optimizer step after each batch of answers, so that training goes on under load.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from jaxserve.bench.finetune import Backward
from jaxserve.bench.ran import NOT_OVER, Asked, Ran, StepRow
from jaxserve.bench.replay import Mix
from jaxserve.bench.workload import BenchRequest, Workload

POLICIES = ("serve-first", "alternate")
Generate = Callable[[Sequence[BenchRequest], Callable[[], bool]], list[list[int]]]  # see TransformersPeer.generate


class TimeSliced:
    """One run.

    Args:
      generate: answers a batch; backwards: trains, one backward at a time, without end.
      seconds: requests come, and finetune tokens count, for so long; it goes on until requests are over.
      drain_seconds: but for no longer than this.
      max_batch: most requests of a batch.
    """

    def __init__(
        self,
        generate: Generate,
        backwards: Iterator[Backward],
        policy: str,
        workload: Workload,
        *,
        seconds: float,
        drain_seconds: float,
        max_batch: int,
        clock: Callable[[], float] = time.perf_counter,
    ):
        assert policy in POLICIES, f"{policy=}"
        self.generate, self.backwards, self.clock = generate, backwards, clock
        self.policy, self.max_batch = policy, max_batch
        self.seconds, self.end = seconds, seconds + drain_seconds
        self.requests = [(request, Asked.of(request)) for request in workload.requests]
        self.coming, self.waiting = deque(self.requests), deque[tuple[BenchRequest, Asked]]()
        self.steps: list[StepRow] = []
        self.losses: list[float] = []
        self.began = self.loss = 0.0

    @property
    def now(self) -> float:
        """Seconds since the start of the run."""
        return self.clock() - self.began

    def __call__(self) -> Ran:
        self.began, cpu = self.clock(), time.process_time()
        while not self._over():
            self._receive()
            if not self.waiting:
                self._train()
                continue
            self._answer()
            if self.policy == "alternate":
                while not self._train() and self.now < self.end:
                    pass
        return Ran(
            name=self.policy,
            seconds=self.seconds,
            requests=[record for _, record in self.requests],
            steps=self.steps,
            duration=self.now,
            cpu_seconds=time.process_time() - cpu,
            losses={"": self.losses},
        )

    def _over(self) -> bool:
        served = not (self.coming or self.waiting)
        return self.now >= (self.seconds if served else self.end)

    def _receive(self) -> None:
        while self.coming and self.coming[0][0].arrival_s <= self.now:
            self.waiting.append(self.coming.popleft())

    def _answer(self) -> None:
        at = self.now
        batch = [self.waiting.popleft() for _ in range(min(self.max_batch, len(self.waiting)))]

        def each_token() -> bool:
            now = self.now
            for _, record in batch:
                if record.num_outputs < record.output_tokens:
                    record.token_times.append(now)
            return now >= self.end

        rows = self.generate([request for request, _ in batch], each_token)
        for (_, record), token_ids in zip(batch, rows, strict=True):
            record.token_ids = token_ids
            record.error = None if record.num_outputs == record.output_tokens else NOT_OVER
        prompts = sum(record.prompt_tokens for _, record in batch)
        self._note(at, Mix(decode=sum(map(len, rows)), prefill=prompts))

    def _train(self) -> bool:
        """One backward; True where an optimizer step is done with it."""
        at, done = self.now, next(self.backwards)
        self.loss += done.loss
        if done.ends_step:
            self.losses.append(self.loss)
            self.loss = 0.0
        self._note(at, Mix(backward=done.tokens))
        return done.ends_step

    def _note(self, at: float, mix: Mix) -> None:
        self.steps.append(StepRow(0, at, self.now - at, math.inf, "", mix, 0, len(self.waiting), 0.0))
