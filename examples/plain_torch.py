"""Plain PyTorch: a loss is a function of tensors, so it goes where any other would."""

import torch

import matryo as mt
from debian import WIDTHS, found, new_model, pairs
from matryo.losses import nested_info_nce

anchors, positives = pairs()
model = new_model(anchors + positives)
nesting = mt.Nesting(WIDTHS)
optimizer = torch.optim.Adam(model.parameters(), lr=0.05)

losses = []
for _ in range(5):
    for rows in torch.randperm(len(anchors)).split(64):
        columns = [model.preprocess([texts[n] for n in rows]) for texts in (anchors, positives)]
        embedded = [model(column)["sentence_embedding"] for column in columns]
        loss, values = nested_info_nce(*embedded, nesting=nesting, temperature=0.05, per_width=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

print("last loss by width:", dict(zip(WIDTHS, values.tolist(), strict=True)))
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}; found by width:", {width: found(model, width) for width in WIDTHS})
