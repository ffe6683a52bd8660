# The small anchor alone.
_base_ = "vit-l_setr_1k_camvid-256x256.py"
work_dir = "work_dirs/camvid/anchor_s"
model = dict(
    backbone=dict(
        anchors=[dict(model="vit_tiny_patch16_224", embed_dim=96, depth=6, num_heads=3)],
        out_indices=dict(train=(3, 5), test=(5,)),
    ),
    decode_head=dict(in_channels=96),
    auxiliary_head=dict(in_channels=96),
)
