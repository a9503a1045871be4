"""The same model as a hivemind RemoteExpert pipeline; run by a Python that has hivemind.

Two servers hold half of the layers each, one thread each; the client has embedding, norm, head and
loss and keeps several micro-batches on their way. Servers step no optimizer (the library would step
it on every backward request); so does the client, which favours hivemind. SETTINGS as for
`pipeline_rank.py`, and `in_flight`. Each step's end is a line of JSON on stdout.
"""

import json
import multiprocessing as mp
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

ANSWER_SECONDS = 120.0


def serve(
    number: int, servers: int, settings: dict[str, Any], initial: list[str], tell: Any
) -> None:
    """A server with its share of the layers, until it is killed."""
    os.setsid()  # hivemind forks more processes: they are ended as one group
    import hivemind
    import torch
    from hivemind.moe.server import ModuleBackend, Server
    from hivemind.utils.tensor_descr import BatchTensorDescriptor
    from pipeline_rank import Stage, make_model

    torch.set_num_threads(1)
    layers = int(settings["config"]["num_hidden_layers"])
    stage = Stage(
        make_model(settings), layers * number // servers, layers * (number + 1) // servers
    )
    stage.embed = stage.norm = stage.head = None
    shape = BatchTensorDescriptor(
        int(settings["sequence"]), int(settings["config"]["hidden_size"]), requires_grad=True
    )
    backend = ModuleBackend(
        f"stage.{number}",
        stage,
        optimizer=None,
        args_schema=(shape,),
        outputs_schema=shape,
        max_batch_size=64,
        min_batch_size=1,
    )
    dht = hivemind.DHT(initial_peers=initial, start=True)
    server = Server(
        dht,
        {backend.name: backend},
        num_connection_handlers=1,
        device=torch.device("cpu"),
        start=False,
        stats_report_interval=None,
    )
    tell.put([str(address) for address in dht.get_visible_maddrs()])
    server.run()


def main() -> None:
    settings = json.loads(sys.argv[1])
    mp.set_start_method("spawn")
    servers, queue, initial = [], mp.Queue(), list[str]()
    for number in range(2):
        process = mp.Process(target=serve, args=(number, 2, settings, initial, queue))
        process.start()
        servers.append(process)
        initial = initial or queue.get(timeout=ANSWER_SECONDS)
        if number:
            queue.get(timeout=ANSWER_SECONDS)
    try:
        train(settings, initial)
    finally:
        for process in servers:
            os.killpg(process.pid, signal.SIGKILL)
    os._exit(0)  # its threads do not end by themselves


def train(settings: dict[str, Any], initial: list[str]) -> None:
    """The client's part."""
    import hivemind
    import torch
    from hivemind.moe.server.dht_handler import get_experts
    from pipeline_rank import Windows, loss_of, make_model

    torch.set_num_threads(1)
    dht = hivemind.DHT(initial_peers=initial, start=True, client_mode=True)
    deadline = time.monotonic() + ANSWER_SECONDS
    while not all(experts := get_experts(dht, ["stage.0", "stage.1"])):
        if time.monotonic() > deadline:
            raise RuntimeError("the servers were not found")
        time.sleep(0.5)
    model = make_model(settings)
    embed, norm, head = model.model.embed_tokens, model.model.norm, model.lm_head
    parameters = [*embed.parameters(), *norm.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, 3e-4)
    batches = int(settings["micro_batches"])
    adding = threading.Lock()

    def micro_batch(ids: torch.Tensor, labels: torch.Tensor) -> float:
        value = experts[1](experts[0](embed(ids).requires_grad_(True)))
        loss = loss_of(head(norm(value)), labels) / batches
        loss.backward()
        with adding:
            return float(loss.detach())

    windows, pool = Windows(settings), ThreadPoolExecutor(int(settings["in_flight"]))
    for step in range(int(settings["steps"])):
        ids, labels = windows.step(step)
        both = zip(ids.chunk(batches), labels.chunk(batches), strict=True)
        sum(pool.map(lambda pair: micro_batch(*pair), both))
        optimizer.step()
        optimizer.zero_grad()
        print(json.dumps({"step": step, "time": time.time()}), flush=True)
    dht.shutdown()


if __name__ == "__main__":
    main()
