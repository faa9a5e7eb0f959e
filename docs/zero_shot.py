"""Zero-shot classification of one image in two languages with the transformers pipeline.

python docs/zero_shot.py runs/quickstart/nano/model runs/quickstart/scenes
"""

import json
import sys

from datasets import load_dataset
from transformers import pipeline

import modeling_m2encoder  # noqa: F401  registers the model, so that no trust_remote_code is needed

model, scenes = sys.argv[1:]
classify = pipeline("zero-shot-image-classification", model=model)

# One scene of the test split with a single object: its pair of colour and shape was never seen in training.
test = load_dataset("parquet", data_files=f"{scenes}/test-*.parquet", split="train")
row = next(row for row in test if len(json.loads(row["scene"])["objects"]) == 1)
print("The picture:", row["captions_en"][0], "|", row["captions_zh"][0])

questions = {
    "a picture of a {} shape": ["red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "brown", "black"],
    "一个{}图形的图片": ["红色", "橙色", "黄色", "绿色", "青色", "蓝色", "紫色", "粉色", "棕色", "黑色"],
}
for template, labels in questions.items():
    answers = classify(row["image"], candidate_labels=labels, hypothesis_template=template)
    print(template, " ".join(f"{answer['label']} {answer['score']:.2f}" for answer in answers[:3]))
