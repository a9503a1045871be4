"""What a stranger would type: load the model with transformers alone, measure it on the text.

    python plain_loss.py MODEL_DIRECTORY TEXT SEQUENCE

Imports nothing of tdmld. Prints the mean loss in nats a byte over 256 windows spread evenly over
the last tenth of the text, which training never saw.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

directory, text, sequence = sys.argv[1], Path(sys.argv[2]).read_bytes(), int(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(directory).eval()
first = len(text) - len(text) // 10
windows = (len(text) - first - 1) // sequence
losses = []
for number in range(256):
    start = first + sequence * (number * windows // 256)
    window = torch.tensor(list(text[start : start + sequence + 1]))
    with torch.no_grad():
        logits = model(window[None, :-1]).logits[0]
    losses.append(float(torch.nn.functional.cross_entropy(logits, window[1:])))
print(sum(losses) / len(losses))
