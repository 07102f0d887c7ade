"""What a model card says of a detection model. `model_card.py` has the rest, and says the same of segmentation."""

import json

from transformers import PreTrainedConfig


TASK = "object-detection"
DINO_PAPER = """@inproceedings{zhang2023dino,
  title = {DINO: DETR with Improved DeNoising Anchor Boxes for End-to-End Object Detection},
  author = {Zhang, Hao and Li, Feng and Liu, Shilong and Zhang, Lei and Su, Hang and Zhu, Jun and Ni, Lionel M. and
    Shum, Heung-Yeung},
  booktitle = {International Conference on Learning Representations},
  year = {2023},
  url = {https://arxiv.org/abs/2203.03605}
}"""
DINO = "[DINO](https://arxiv.org/abs/2203.03605)"
DESCRIPTIONS = {
    "proscale": f"An object detection model: [PRO-SCALE](https://arxiv.org/abs/2404.14657) makes the encoder of {DINO} "
    "cheap by letting the tokens of larger feature maps enter only in its later stages.",
    "dino": f"An object detection model of the {DINO} architecture: a multi-scale deformable-attention encoder, and a "
    "decoder whose queries look around their own boxes.",
    "lite": f"An object detection model of the {DINO} architecture with the encoder of "
    "[Lite-DETR](https://arxiv.org/abs/2303.07446), which changes the largest map only in its last layer.",
}


def architecture(config: PreTrainedConfig) -> str:
    """The model's name."""
    if config.encoder == "proscale":
        return f"DINO with PRO-SCALE ({', '.join(map(str, config.encoder_stage_layers))})"
    return {"dino": "DINO", "lite": "Lite-DINO"}[config.encoder]


def use(repo_id: str) -> str:
    """The examples, as Markdown."""
    name = json.dumps(repo_id)
    return f"""```python
from transformers import pipeline

detector = pipeline("{TASK}", model={name}, trust_remote_code=True)
for detection in detector("photo.jpg"):
    print(detection["label"], detection["score"], detection["box"])
```

Or step by step:

```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForObjectDetection

model = AutoModelForObjectDetection.from_pretrained({name}, trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained({name}, trust_remote_code=True)
image = Image.open("photo.jpg")
with torch.no_grad():
    outputs = model(**processor(image, return_tensors="pt"))
result = processor.post_process_object_detection(outputs, target_sizes=[(image.height, image.width)])[0]
```"""
