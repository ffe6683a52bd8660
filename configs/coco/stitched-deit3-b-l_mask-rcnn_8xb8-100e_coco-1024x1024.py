_base_ = "stitched-deit3-s-l_mask-rcnn_8xb8-100e_coco-1024x1024.py"
model = dict(
    backbone=dict(
        anchors=[
            dict(
                model="deit3_base_patch16_224.fb_in22k_ft_in1k",
                pretrained=True,
                drop_path_rate=0.1,
                window_size=16,
                global_blocks=(2, 5, 8, 11),
            ),
            dict(
                model="deit3_large_patch16_224.fb_in22k_ft_in1k",
                pretrained=True,
                drop_path_rate=0.4,
                window_size=16,
                global_blocks=(5, 11, 17, 23),
            ),
        ],
        rank=4,
    )
)
