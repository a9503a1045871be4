"""The second ledger's money, nodes, stake, evidence, epochs (sections 6 and 9)."""

from tests.chain.second.committees import (
    VIEWS,
    Weighed,
    absent,
    elect,
    epoch_of,
    passed_over,
    table,
    who_leads,
)
from tests.chain.second.formats import FINALIZE, HEADER, NULLIFY, ZERO, H, pack, signed, u64
from tests.chain.second.records import AHEAD, MILLION, Ledger, Record, ceil, encoded, rule

UNBONDINGS = 16
ABSENCES = 4096


class Staking(Ledger):
    """Who owns what, who votes, and what a double vote costs."""

    def burn(self, amount: int) -> None:
        """FEE-4."""
        self.put(b"S", self.db[b"S"], burned=self.db[b"S"]["burned"] + amount)

    # -- 9: transfers, nodes

    def transfer(self, signer: bytes, what: Record, _: bytes) -> None:
        """TX-6."""
        rule(0 < what["amount"] <= self.account(signer)["balance"], "TX-6")
        self.move(signer, -what["amount"])
        self.move(what["to"], what["amount"])

    def bond(self, signer: bytes, what: Record, _: bytes) -> None:
        """TX-7."""
        account, amount = self.account(signer), what["amount"]
        rule(0 < amount <= account["balance"] and what["bucket"] in ("vote", "work"), "TX-7")
        name = what["bucket"] + "_stake"
        changes = {"balance": account["balance"] - amount, name: account[name] + amount}
        self.put(b"a" + signer, account, **changes)

    def register(self, signer: bytes, what: Record, _: bytes) -> None:
        """TX-8."""
        node, start = what["node"], what["from_height"]
        message = signer + u64(start)
        rule(signed(node, "register", self.chain, message, what["proof"]), "TX-8")
        rule(node != signer and b"n" + node not in self.db, "TX-8")
        rule(self.height < start <= self.height + AHEAD, "TX-8")
        self.db[b"n" + node] = {**self.zeros(b"n" + node), "owner": signer, "from_height": start}

    def own_node(self, signer: bytes, node: bytes) -> Record:
        record = self.known(b"n" + node)
        rule(record["owner"] == signer and not record["revoked"], "STAKE-4, STAKE-5")
        return record

    def nominate(self, signer: bytes, what: Record, _: bytes) -> None:
        """STAKE-4."""
        rule(not self.own_node(signer, what["node"])["convicted"], "STAKE-4")
        rule(self.account(signer)["vote_stake"] >= self.rules["vote_stake_min"], "STAKE-4")
        self.db[b"w" + signer] = {"node": what["node"]}
        self.index(b"w", signer, True)

    def revoke(self, signer: bytes, what: Record, _: bytes) -> None:
        """STAKE-5."""
        node = what["node"]
        self.put(b"n" + node, self.own_node(signer, node), revoked=self.height)
        if self.db.pop(b"k" + node, None) is not None:
            self.index(b"k", node, False)
        if self.db.get(b"w" + signer) == {"node": node}:
            del self.db[b"w" + signer]
            self.index(b"w", signer, False)

    def come_back(self, signer: bytes, what: Record, _: bytes) -> None:
        """JAIL-4."""
        node = self.known(b"n" + signer)
        rule(0 != node["jailed"] == what["jailed"], "JAIL-4")
        rule(not node["revoked"] and not node["convicted"], "JAIL-4")
        self.put(b"n" + signer, node, jailed=0)

    # -- 9: stake on its way back

    def entries(self, owner: bytes) -> list[Record]:
        return list(self.db.get(b"b" + owner, {"entries": []})["entries"])

    def put_entries(self, owner: bytes, entries: list[Record]) -> None:
        """By bucket and epoch, one of each."""
        amounts: dict[tuple[str, int], int] = {}
        for entry in entries:
            place = entry["bucket"], entry["epoch"]
            amounts[place] = amounts.get(place, 0) + entry["amount"]
        rows = [
            {"bucket": bucket, "amount": amount, "epoch": epoch}
            for (bucket, epoch), amount in sorted(amounts.items())
        ]
        self.db.pop(b"b" + owner, None)
        if rows:
            self.db[b"b" + owner] = {"entries": rows}

    def unbond(self, signer: bytes, what: Record, _: bytes) -> None:
        """STAKE-1."""
        account, amount, bucket = self.account(signer), what["amount"], what["bucket"]
        rule(bucket in ("vote", "work"), "STAKE-1")
        stake = account[bucket + "_stake"]
        rule(0 < amount <= stake, "STAKE-1")
        self.put(b"a" + signer, account, **{bucket + "_stake": stake - amount})
        fresh = {"bucket": bucket, "amount": amount, "epoch": self.epoch + 2}
        self.put_entries(signer, [*self.entries(signer), fresh])
        rule(len(self.entries(signer)) <= UNBONDINGS, "STAKE-1")

    def withdraw(self, signer: bytes, _what: Record, _: bytes) -> None:
        """STAKE-2."""
        entries = self.entries(signer)
        over = [entry for entry in entries if self.windows_over(entry["epoch"])]
        rule(over != [], "STAKE-2")
        self.put_entries(signer, [entry for entry in entries if entry not in over])
        self.move(signer, sum(entry["amount"] for entry in over))

    def windows_over(self, epoch: int) -> bool:
        """STAKE-2."""
        start = self.db.get(b"e" + u64(epoch))
        if start is None:
            return False
        blocks, seconds = self.rules["unbonding"]
        late = self.at.time_ms > start["time_ms"] + 1000 * seconds
        return late and self.height > start["height"] + blocks

    # -- 9: evidence

    def vote_evidence(self, _signer: bytes, what: Record, _: bytes) -> None:
        """SLASH-1."""
        node, view = what["node"], what["view"]
        votes = what["first"], what["second"]
        for kind, block, signature in votes:
            rule((kind == NULLIFY) == (block == ZERO), "SLASH-1")
            message = bytes((kind,)) + u64(view) + block
            rule(signed(node, "vote", self.chain, message, signature), "SLASH-1")
        (kind, block, _), (other, another, _) = votes
        same = kind == other and block != another
        rule(same or {kind, other} == {NULLIFY, FINALIZE}, "SLASH-1")
        self.convict(node, view // VIEWS)

    def proposal_evidence(self, _signer: bytes, what: Record, _: bytes) -> None:
        """SLASH-1."""
        first, second = (dict(zip(HEADER, what[name], strict=True)) for name in ("first", "second"))
        rule(first != second and first["view"] == second["view"], "SLASH-1")
        rule(first["proposer"] == second["proposer"], "SLASH-1")
        for name in ("first", "second"):
            block, signature = H(pack(what[name])), what[name + "_signature"]
            rule(signed(first["proposer"], "proposal", self.chain, block, signature), "SLASH-1")
        self.convict(first["proposer"], first["view"] // VIEWS)

    def convict(self, node: bytes, epoch: int) -> None:
        """SLASH-1 to SLASH-3."""
        seats = self.known(b"v" + u64(epoch))["seats"]
        owners = [seat["owner"] for seat in seats if seat["node"] == node]
        rule(owners != [], "SLASH-1")
        owner = owners[0]
        key = b"x" + owner + node + u64(epoch)
        rule(key not in self.db and not self.windows_over(epoch + 1), "SLASH-2")
        account, entries = self.account(owner), self.entries(owner)
        left = [
            {**entry, "amount": entry["amount"] - self.penalty(entry["amount"])}
            if entry["bucket"] == "vote" and entry["epoch"] > epoch
            else entry
            for entry in entries
        ]
        stake = self.penalty(account["vote_stake"])
        cost = stake + sum(e["amount"] for e in entries) - sum(e["amount"] for e in left)
        self.put(b"a" + owner, account, vote_stake=account["vote_stake"] - stake)
        self.put_entries(owner, [entry for entry in left if entry["amount"]])
        self.burn(cost)
        self.db[key] = {"node": node, "height": self.height, "burned": cost}
        record = self.db[b"n" + node]
        self.put(b"n" + node, record, convicted=record["convicted"] or self.height)

    def penalty(self, amount: int) -> int:
        return ceil(amount * self.rules["slash_ppm"], MILLION)

    # -- 6: epochs

    @property
    def epoch(self) -> int:
        return epoch_of(self.height, self.rules["epoch_blocks"])

    def seats(self, epoch: int) -> list[Record]:
        found: list[Record] = self.db[b"v" + u64(epoch)]["seats"]
        return found

    def set_id(self, epoch: int) -> bytes:
        """BLK-9."""
        return H(encoded("v", self.db[b"v" + u64(epoch)]))

    def weighed(self, epoch: int) -> tuple[tuple[int, bool], ...]:
        return tuple((seat["weight"], seat["leads"]) for seat in self.seats(epoch))

    def miss_turns(self) -> None:
        """JAIL-1."""
        views = passed_over(self.at.parent_view, self.at.view)[-ABSENCES:]
        if not views:
            return
        key, leaders = b"m" + u64(self.epoch), table(self.weighed(self.epoch))
        missed = list(self.db.get(key, {"missed": [0] * len(self.seats(self.epoch))})["missed"])
        for number in views:
            missed[leaders[number % len(leaders)]] += 1
        self.db[key] = {"missed": missed}

    def end_epoch(self) -> None:
        """EPOCH-2, with e = `begins`."""
        begins = self.epoch + 1
        self.db[b"e" + u64(begins)] = {"height": self.height, "time_ms": self.at.time_ms}
        self.jail_absent(begins - 1)
        old = weights_of(self.seats(begins))
        new = elect(old, self.wanted(), self.rules["validators_max"])
        jailed = {node for node in new if self.db[b"n" + node]["jailed"]}
        leads = who_leads({node: weight for node, (_, weight) in new.items()}, jailed)
        seats = [
            {"node": node, "owner": owner, "weight": weight, "leads": leads[node]}
            for node, (owner, weight) in sorted(new.items())
        ]
        self.db[b"v" + u64(begins + 1)] = {"epoch": begins + 1, "seats": seats}
        for owner in sorted({owner for owner, _ in old.values()}):
            self.hold_back(owner, begins + 1)

    def jail_absent(self, epoch: int) -> None:
        """JAIL-2."""
        record = self.db.pop(b"m" + u64(epoch), None)
        if record is None:
            return
        for index in absent(self.weighed(epoch), record["missed"], self.at.view % VIEWS):
            node = self.seats(epoch)[index]["node"]
            found = self.db[b"n" + node]
            self.put(b"n" + node, found, jailed=found["jailed"] or self.height)

    def wanted(self) -> Weighed:
        """EPOCH-3."""
        found = []
        for key, nominee in self.db.items():
            if key[:1] == b"w":
                owner, node = key[1:], nominee["node"]
                record, stake = self.db[b"n" + node], self.account(owner)["vote_stake"]
                barred = record["owner"] != owner or record["revoked"] or record["convicted"]
                if not barred and stake >= self.rules["vote_stake_min"]:
                    found.append((-stake, node, owner))
        found = sorted(found)[: self.rules["validators_max"]]
        return {node: (owner, -stake) for stake, node, owner in found}

    def hold_back(self, owner: bytes, epoch: int) -> None:
        """STAKE-3, when the set of `epoch` is put."""
        weight = sum(seat["weight"] for seat in self.seats(epoch) if seat["owner"] == owner)
        if weight > self.account(owner)["vote_stake"]:
            moved = [
                {**entry, "epoch": epoch + 1}
                if (entry["bucket"], entry["epoch"]) == ("vote", epoch)
                else entry
                for entry in self.entries(owner)
            ]
            self.put_entries(owner, moved)


def weights_of(seats: list[Record]) -> Weighed:
    return {seat["node"]: (seat["owner"], seat["weight"]) for seat in seats}
