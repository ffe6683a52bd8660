# The toolbox's schedule for ConvNeXt: more weight decay, lower rates towards the stem. The toolbox trains in mixed
# precision: add --amp.
_base_ = "schedule_160k_swin.py"
optim_wrapper = dict(
    optimizer=dict(lr=1e-4, weight_decay=0.05),
    # Block by block to the toolbox's rates of the stems, which are 0.48 of the head's (tiny) and 0.25 (small, base).
    paramwise_cfg=dict(layer_decay_rate=0.963),
)
