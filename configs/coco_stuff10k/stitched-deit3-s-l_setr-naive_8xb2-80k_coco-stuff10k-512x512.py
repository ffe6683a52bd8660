_base_ = [
    "../_base_/models/stitched-deit3-s-l_setr-naive.py",
    "../_base_/datasets/coco_stuff10k.py",
    "../_base_/schedules/schedule_80k.py",
    "../_base_/default_runtime.py",
]
model = dict(
    decode_head=dict(num_classes=171),
    auxiliary_head=[
        dict(
            type="SETRUPHead",
            in_channels=1024,
            in_index=index,
            channels=256,
            num_convs=2,
            up_scale=4,
            kernel_size=1,
            num_classes=171,
            dropout_ratio=0,
            norm_cfg=dict(type="SyncBN", requires_grad=True),
            align_corners=False,
            loss_decode=dict(type="CrossEntropyLoss", loss_weight=0.4),
        )
        for index in (0, 1, 2)
    ],
)
