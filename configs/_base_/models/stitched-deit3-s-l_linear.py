# The same backbone, with a linear head on the last tap.
_base_ = "stitched-deit3-s-l_setr-naive.py"
model = dict(
    decode_head=dict(
        _delete_=True,
        type="mmsnnet.LinearHead",
        in_channels=1024,
        in_index=3,
        num_classes=150,
        dropout_ratio=0.1,
        norm_cfg=dict(type="SyncBN", requires_grad=True),
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", loss_weight=1.0),
    ),
    auxiliary_head=None,
)
