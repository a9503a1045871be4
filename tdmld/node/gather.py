"""Bringing together what a task needs: data, states, frames, results; checked by their roots.

The carrier fetches and hashes; whether a file is the right one is decided here, by its root.
"""

import secrets
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import trio

from tdmld.node import control
from tdmld.node.carrierclient import CarrierClient
from tdmld.node.errors import (
    AuditImpossible,
    ContentError,
    ContentMismatch,
    ContentRefused,
    ContentUnavailable,
)
from tdmld.node.jobfiles import (
    has_content,
    has_frames,
    has_part,
    has_state,
    is_used_directory,
    keep_given,
    move_up,
    prepare_directory,
    remove_tree,
    remove_unfinished,
    replace_directory,
    state_limit,
    take_contribution,
    take_part,
    write_result,
)
from tdmld.node.layout import Layout, contribution_file, state
from tdmld.node.machine_types import (
    AuditTask,
    ContributionSource,
    ResultInfo,
    SlotId,
    StateRoots,
    StateSource,
)
from tdmld.node.seal import sealing
from tdmld.node.workers import given_parts
from tdmld.train.errors import FileError
from tdmld.train.export import read_result, result_limits
from tdmld.train.framelog import frame_log_name
from tdmld.train.spec import Spec, decode_spec
from tdmld.train.statefile import PARTS, part_file

FRAME_OVERHEAD_BYTES = 128


class Gatherer:
    """All methods may be cancelled; what is half done is removed."""

    def __init__(self, layout: Layout, session: str, carrier: CarrierClient) -> None:
        self._layout = layout
        self._session = session
        self._carrier = carrier

    async def fetch_data(self, job: bytes, spec: bytes, holders: Sequence[str]) -> None:
        """See Machine.fetch_data."""
        shards = decode_spec(spec).shards
        await self._carrier.call(
            lambda n: control.FetchData(n, job, sealing(spec), shards, _holders(holders)),
            control.Done,
        )

    @asynccontextmanager
    async def text(self, spec: bytes, stage: int) -> AsyncIterator[int | None]:
        """A socket (descriptor) from which a worker of the stage receives the text in memory; None
        for a stage that does not read it. ContentError when the text is not here."""
        program = decode_spec(spec)
        if not program.reads_text(stage):
            yield None
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with ours:
            with theirs:
                await self._carrier.call(
                    lambda n: control.HandData(n, sealing(spec), program.shards),
                    control.Done,
                    (theirs.fileno(),),
                )
            yield ours.fileno()

    async def publish_given(self, files: Mapping[bytes, Path]) -> None:
        """See Machine.publish_given."""
        for root, path in files.items():
            await trio.to_thread.run_sync(keep_given, path, root, self._layout.given(root))

    async def fetch_given(
        self, job: bytes, spec: bytes, slot: SlotId, holders: Sequence[str]
    ) -> None:
        """See Machine.fetch_given."""
        program = decode_spec(spec)
        for part, root in given_parts(program, slot):
            path = self._layout.given(root)
            check = partial(has_part, path, root, part)
            if not await trio.to_thread.run_sync(check):
                item = control.GivenFile(job, root)
                limit = state_limit(program, slot.stage)
                await self._fetch_checked(item, limit, holders, path, check)

    async def begin(self, job: bytes, spec: bytes, directory: Path) -> None:
        """Directory and spec file for a worker of a job that is no live one."""
        await trio.to_thread.run_sync(prepare_directory, directory, self._layout.spec(job), spec)

    async def audit_inputs(self, task: AuditTask, directory: Path) -> None:
        """Everything that a replay needs but the text, checked. AuditImpossible."""
        spec = decode_spec(task.spec)
        everybody = [*task.data_holders, *task.state_holders]
        everybody += [holder for link in task.links.values() for holder in link.holders]
        try:
            if spec.reads_text(task.slot.stage):
                await self.fetch_data(task.job, task.spec, list(dict.fromkeys(everybody)))
        except ContentError as error:
            raise AuditImpossible(f"data: {error}") from error
        await trio.to_thread.run_sync(remove_tree, directory)
        await self.begin(task.job, task.spec, directory)
        try:
            await self.state(
                task.job,
                task.spec,
                task.slot,
                task.segment,
                task.state_holders,
                task.start,
                directory,
            )
        except ContentError as error:
            raise AuditImpossible(f"start state: {error}") from error
        await self._audited_frames(task, spec, directory)
        try:
            await self.contributions(
                task.job, task.spec, task.slot, task.segment - 1, task.contributions, directory
            )
        except ContentError as error:
            raise AuditImpossible(f"contributions: {error}") from error

    async def _audited_frames(self, task: AuditTask, spec: Spec, directory: Path) -> None:
        """What the audited slot received, from those who sent it. AuditImpossible."""
        lane, stage = task.slot
        for link in spec.logged_links(lane, stage, task.segment):
            if link not in task.links:
                raise AuditImpossible(f"frames of link {link}: no root and holder are known")
            source, frame_bytes = task.links[link], spec.link_frame_bytes(stage, link)
            limit = spec.link_frames(lane, stage, link) * (frame_bytes + FRAME_OVERHEAD_BYTES)
            *other, theirs = spec.other_end(lane, stage, link)
            sender = control.Slot(task.job, *other)
            item = control.FramesFile(sender, task.segment, theirs)
            path = directory / frame_log_name(task.segment, link, "received")
            check = partial(has_frames, path, source.root, frame_bytes)
            try:
                await self._fetch_checked(item, limit, source.holders, path, check)
            except ContentError as error:
                raise AuditImpossible(f"frames of link {link}: {error}") from error

    async def contributions(
        self,
        job: bytes,
        spec: bytes,
        slot: SlotId,
        number: int,
        sources: Mapping[int, ContributionSource],
        owner: Path,
    ) -> None:
        """Bring contributions of a round, by lane, to the directory `owner` of a slot of their
        stage; each is checked by its id. ContentError names what is missing."""
        limit = decode_spec(spec).contribution_bytes(slot.stage)
        missing = []
        for lane, source in sorted(sources.items()):
            path = contribution_file(owner, number, lane)
            here = self._layout.contributions(job, lane, slot.stage, number)
            if await trio.to_thread.run_sync(take_contribution, path, source.id, limit, here):
                continue
            other = control.Slot(job, lane, slot.stage)
            item = control.ContributionFile(other, number, source.id)
            check = partial(has_content, path, source.id, limit)
            try:
                await self._fetch_checked(item, limit, source.holders, path, check)
            except ContentUnavailable as error:
                missing.append(f"lane {lane}: {error}")
        if missing:
            raise ContentUnavailable(f"contributions to round {number}: {'; '.join(missing)}")

    async def state(
        self,
        job: bytes,
        spec: bytes,
        slot: SlotId,
        boundary: int,
        holders: Sequence[str],
        expected: StateRoots,
        owner: Path,
    ) -> None:
        """Bring a slot's state at a boundary to the directory `owner`: from another one here, else
        from holders. It appears whole or not at all; at once when it is there. What was brought
        when it breaks off stays aside: the next try goes on there. ContentError."""
        target = state(owner, boundary)
        if await trio.to_thread.run_sync(has_state, target, expected):
            return
        aside = target.with_name(f"{target.name}.new")
        limit = state_limit(decode_spec(spec), slot.stage)
        here = [
            path
            for path in self._layout.states(job, slot.lane, slot.stage, boundary)
            if path != target
        ]
        for part, root in zip(PARTS, expected, strict=True):
            path = aside / part_file(part)
            check = partial(has_part, path, root)
            if await trio.to_thread.run_sync(check):
                continue
            copies = [copy / part_file(part) for copy in here]
            if await trio.to_thread.run_sync(take_part, path, root, copies):
                continue
            item = control.StateFile(control.Slot(job, *slot), boundary, part)
            await self._fetch_checked(item, limit, holders, path, check)
        await trio.to_thread.run_sync(replace_directory, aside, target)

    def _local_shared(self, job: bytes, slot: SlotId, boundary: int, root: bytes) -> Path | None:
        for directory in self._layout.states(job, slot.lane, slot.stage, boundary):
            path = directory / part_file("shared")
            if path.is_file() and has_part(path, root):
                return path
        return None

    async def _fetch_checked(
        self,
        item: control.Item,
        limit: int,
        holders: Sequence[str],
        path: Path,
        check: Callable[[], bool],
    ) -> None:
        """Bring a file from holders whose copy passes `check` (run in a thread)."""
        answers, left = [], _holders(holders)
        while left:
            try:
                stored = await self._carrier.call(
                    lambda n, h=left: control.FetchFile(n, item, limit, h, str(path)),  # type: ignore[misc]
                    control.Stored,
                )
            except ContentUnavailable as error:
                answers.append(str(error))
                break
            if await trio.to_thread.run_sync(check):
                return
            answers += [f"{h}: has not the root that was promised" for h in stored.holders]
            left = tuple(holder for holder in left if holder not in stored.holders)
            await trio.to_thread.run_sync(partial(path.unlink, missing_ok=True))
        raise ContentUnavailable("; ".join(answers) or "no holder is known")

    async def _fetch_result_from(
        self, job: bytes, holders: tuple[str, ...], directory: Path, limits: Mapping[str, int]
    ) -> None:
        """Bring the files of a result; each may come from several holders at once."""
        listing = await self._carrier.call(
            lambda n: control.ListResult(n, job, holders), control.Listing
        )
        sizes = dict(listing.files)
        for name, limit in limits.items():
            if name not in sizes:
                raise ContentUnavailable(f"it has no {name}")
            path = str(directory / name)
            item = control.ResultFile(job, name)
            await self._carrier.call(
                lambda n, i=item, p=path, s=limit: control.FetchFile(n, i, s, holders, p),  # type: ignore[misc]
                control.Stored,
            )

    async def make_result(
        self, job: bytes, spec: bytes, final: Mapping[SlotId, StateSource]
    ) -> ResultInfo:
        """See Machine.make_result."""
        program = decode_spec(spec)
        boundary = program.rounds
        scratch = self._layout.job(job) / "gathered"
        files: list[Path] = []
        try:
            for stage in range(program.stages):
                slot = next((found for found in sorted(final) if found.stage == stage), None)
                if slot is None:
                    raise ContentUnavailable(f"no state of stage {stage} was named")
                source = final[slot]
                path = await trio.to_thread.run_sync(
                    self._local_shared, job, slot, boundary, source.root
                )
                if path is None:
                    path = scratch / str(stage) / part_file("shared")
                    limit = state_limit(program, stage)
                    item = control.StateFile(control.Slot(job, *slot), boundary, "shared")
                    await self._fetch_checked(
                        item, limit, source.holders, path, partial(has_part, path, source.root)
                    )
                files.append(path)
            target = self._layout.result(job)
            result = await trio.to_thread.run_sync(write_result, program, files, target)
        except FileError as error:
            raise ContentMismatch(str(error)) from error
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(remove_tree, scratch)
        return ResultInfo(result.result_id, result.directory, result.files)

    async def fetch_result(
        self, job: bytes, spec: bytes, result_id: bytes, holders: Sequence[str], out: Path
    ) -> ResultInfo:
        """See Machine.fetch_result."""
        target = Path.cwd() / out
        if await trio.to_thread.run_sync(is_used_directory, target):
            raise ContentRefused(f"{target} is not empty; name a new directory")
        limits = result_limits(decode_spec(spec))
        aside = target / f".{secrets.token_hex(4)}.part"
        answers = []
        try:
            together = _holders(holders)
            alone = [(holder,) for holder in together] if len(together) > 1 else []
            for group in [together, *alone] if together else []:
                try:
                    await self._fetch_result_from(job, group, aside, limits)
                    result = await trio.to_thread.run_sync(read_result, aside)
                    if result.result_id == result_id:
                        await trio.to_thread.run_sync(move_up, aside)
                        return ResultInfo(result.result_id, target, result.files)
                    answers.append(f"{' and '.join(group)}: another result than the one attested")
                except (ContentUnavailable, FileError) as error:
                    answers.append(str(error))
                await trio.to_thread.run_sync(remove_tree, aside)
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(remove_unfinished, aside)
        raise ContentUnavailable("; ".join(answers) or "no holder is known")


def _holders(holders: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(holders))[: control.MAX_HOLDERS]
