"""The second ledger's sections 9 to 12: transactions, market, jobs. Point 8 of an audit."""

import json
from collections.abc import Sequence

from tests.chain.second.beacon import first_mix, next_mix
from tests.chain.second.committees import epoch_of
from tests.chain.second.formats import (
    EVIDENCE,
    FINAL,
    HEADER,
    OWNERS,
    PAYLOADS,
    H,
    check,
    header_of,
    unpack,
)
from tests.chain.second.genesis import first_state
from tests.chain.second.records import (
    Broken,
    Place,
    Record,
    named,
    rule,
)
from tests.chain.second.repairs import Repairs
from tests.chain.second.staking import Staking
from tests.chain.second.trees import state_root

DUE = {
    "match": "match",
    "accept": "accept_over",
    "activate": "activate_over",
    "deadline": "deadline",
    "stall": "window_over",
    "key": "proof_key",
    "draw": "draw",
    "audit": "audit_over",
    "settle": "settle",
    "result": "result_over",
    "replace": "replace_over",
    "standby": "standby_over",
    "case": "case_over",
    "round": "round_over",
}
"""Timer -> method. A transaction's method has the name of its tag, but for a word of Python."""


class Executor(Repairs, Staking):
    """The whole of it."""

    # -- 10: execution

    def block(self, at: Place, raws: list[bytes]) -> list[bool]:
        """EXEC-1, JAIL-1, BEACON-6, EPOCH-2; which transactions succeeded."""
        self.at = at
        self.miss_turns()
        if self.tainted:
            self.db[b"T"] = {"height": self.height}
        for _ in range(self.rules["due_per_block"]):
            entry = self.take()
            if entry is None:
                break
            getattr(self, DUE[entry[0]])(*entry[1:])
        found = [self.transaction(raw) for raw in raws]
        if at.height % self.rules["epoch_blocks"] == 0:
            self.end_epoch()
        self.sum()
        return found

    def transaction(self, raw: bytes) -> bool:
        _, _, signer, nonce, fee, expiry, payload = unpack(raw[64:])
        kind, what = payload[0], named(PAYLOADS[payload[0]], payload[1:])
        assert what is not None
        before = dict(self.db)
        try:
            rule(expiry == 0 or self.height <= expiry, "TX-5")
            if kind in OWNERS:
                self.charge(signer, nonce, fee)
                before = dict(self.db)
            else:
                rule(nonce == fee == 0, "FEE-3")
                if kind not in EVIDENCE:
                    rule(not self.zeros(b"n" + signer)["revoked"], "FEE-3")
                    if kind not in ("ask", "return"):
                        self.burn_for(what["job"])
            getattr(self, "come_back" if kind == "return" else kind)(signer, what, H(raw))
        except Broken:
            self.db = before
            return False
        return True

    def charge(self, signer: bytes, nonce: int, fee: int) -> None:
        """FEE-1."""
        account = self.account(signer)
        rule(fee >= self.rules["fee_floor"], "FEE-1")
        rule(nonce == account["nonce"], "FEE-1")
        rule(account["balance"] >= fee, "FEE-1")
        self.put(b"a" + signer, account, nonce=nonce + 1, balance=account["balance"] - fee)
        self.burn(fee)

    def burn_for(self, job_id: bytes) -> None:
        """FEE-3."""
        job = self.known(b"j" + job_id)
        rule(job["status"] not in FINAL, "FEE-3")
        self.put(b"j" + job_id, job, fee_budget=job["fee_budget"] - self.rules["tx_fee"])
        self.burn(self.rules["tx_fee"])

    # -- 12: jobs

    def attest_genesis(self, signer: bytes, what: Record, _: bytes) -> None:
        job_id = what["job"]
        job = self.known(b"j" + job_id)
        rule(job["status"] == "preparing" and what["slot"] in self.job_slots(job), "JOB-1")
        slot = self.slot(job_id, what["slot"])
        own = self.is_own(job, what["slot"])
        allowed = {slot["worker"]["node"], job["standby"]["node"]}
        rule(signer in (allowed if not own else {job["source"]}), "JOB-1")
        rule(signer not in [roots["node"] for roots in slot["attested"]], "JOB-1")
        mine = {"node": signer, **{name: what[name] for name in ("shared", "lane", "data")}}
        attested = [*slot["attested"], mine]
        self.put_slot(job_id, what["slot"], attested=attested)
        if len(attested) < 2 and not own:
            return
        first, second = ({**attested[place], "node": b""} for place in (0, -1))
        if first != second:
            text = f"slot {what['slot']}: worker and standby found different states at boundary 0"
            self.refund(job_id, "genesis", text)
            return
        self.put_slot(job_id, what["slot"], genesis=attested[0])
        slots = self.job_slots(job)
        if all(self.slot(job_id, other)["genesis"] is not None for other in slots):
            self.put_job(job_id, status="active", active=self.height)
            self.cancel("activate", job_id)
            for other in slots:
                self.stall_clock(job_id, other, "activate_window")

    def activate_over(self, job_id: bytes, *_: int) -> None:
        """JOB-4."""
        job, lacking = self.db[b"j" + job_id], False
        for slot in self.job_slots(job):
            state = self.slot(job_id, slot)
            nodes = [roots["node"] for roots in state["attested"]]
            if state["worker"]["node"] not in nodes:
                self.count(state["worker"]["owner"], "faults")
            lacking |= job["standby"]["node"] not in nodes and not self.is_own(job, slot)
        if lacking:
            self.count(job["standby"]["owner"], "faults")
        self.refund(job_id, "genesis", "boundary 0 was not attested in time")

    def deadline(self, job_id: bytes, *_: int) -> None:
        """JOB-6."""
        job = self.db[b"j" + job_id]
        text = f"not finished by height {job['deadline']}"
        if job["status"] in ("offered", "matched"):
            self.end(job_id, "expired", "deadline", text)
        else:
            self.refund(job_id, "deadline", text)

    def attest_result(self, signer: bytes, what: Record, _: bytes) -> None:
        """JOB-7."""
        job = self.known(b"j" + what["job"])
        rule(job["status"] == "finishing", "JOB-7")
        stages = len(job["stages"])
        last = self.slot(what["job"], self.living(job)[stages - 1])["worker"]["node"]
        holders = {last} if job["standby"] is None else {job["standby"]["node"], last}
        if self.is_own(job, 0):
            holders = {job["source"]}
        rule(signer in holders, "JOB-7")
        rule(signer not in [node for node, _ in job["results"]], "JOB-7")
        known = [result for _, result in job["results"]]
        if what["result"] in known or len(holders) == 1:
            self.put_job(what["job"], result=what["result"])
        self.put_job(what["job"], results=[*job["results"], [signer, what["result"]]])

    def fetched(self, signer: bytes, what: Record, _: bytes) -> None:
        """JOB-8."""
        job = self.known(b"j" + what["job"])
        rule(signer == job["submitter"] and job["status"] == "finishing", "JOB-8")
        rule(job["result"] != b"", "JOB-8")
        self.end(what["job"], "closed", "fetched", "")

    def result_over(self, job_id: bytes, *_: int) -> None:
        """JOB-10."""
        self.end(job_id, "closed", "not_fetched", "the result window is over")


def replay(lines: Sequence[bytes]) -> Executor:
    """Point 8 over an export that passed points 1 to 7: every state, every receipt, and that the
    headers name the validators whom the states elect."""
    rows = [json.loads(line) for line in lines]
    document, chain = rows[0]["document"], bytes.fromhex(rows[0]["chain_id"])
    run = Executor(document, chain, first_state(document)[0])
    mix = first_mix(chain)
    for row in rows:
        if row["line"] != "block":
            continue
        header = dict(zip(HEADER, header_of(row["header"]), strict=True))
        height = header["height"]
        epoch = epoch_of(height, run.rules["epoch_blocks"])
        for name, number in (("validators", epoch), ("next_validators", epoch + 1)):
            check(run.set_id(number) == header[name], f"block {height}: {name} were not elected")
        mix = next_mix(chain, mix, height, header["proposer"], header["proof"])
        at = Place(height, header["view"], header["parent_view"], header["time_ms"], mix)
        found = run.block(at, [bytes.fromhex(one["raw"]) for one in row["transactions"]])
        told = [one["ok"] for one in row["transactions"]]
        check(found == told, f"block {height}: receipts {told}, and not {found}")
        root = state_root(run.state).hex()
        check(root == row["state_root"], f"block {height} gives the state {root}")
    return run
