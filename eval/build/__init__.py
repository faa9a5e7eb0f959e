"""The paper's seven fine-grained sets (Table 3), built from public annotations, in Chinese and English.

    build("coco-mcc", {"annotations": Path("instances_val2014.json"), "karpathy": Path("dataset_coco.json"),
                       "images": Path("val2014")}, Path("sets/coco-mcc"))

`BUILDERS` maps a set's name to its sources and rules: coco-mcc, coco-count, vg-pos, hoi-pos, cub, dogs, cars.
docs/fine_grained.md says where each file comes from.

The folder that `build` writes (`datasets.load_dataset(folder)` loads the default config, split `test`):

    test-00000-of-00001.parquet, ...   one row per image (config "default")
        image_id     string        unique
        file_name    string        the image file, as the annotations name it, relative to the publisher's image folder
        image        Image         the file's own bytes; the column is there only if the source "images" was given
        captions_en  list[string]  the texts that are right for this image, distinct, at least one
        captions_zh  list[string]  the same texts in Chinese, in the same order: entry i translates entry i
        text_ids     list[int32]   rows of texts.parquet, in the same order
        label        ClassLabel    cub, dogs, cars only: 0-based class number (names in English); as are
        name_en, name_zh  string   the bare class name, for prompt ensembles
    texts.parquet                      the gallery: one row per distinct text (config "texts")
        text_id      int32         0, 1, ...
        key          string        what the text says, independent of the language, e.g. "person=2 dog=1"
        text_en, text_zh  string   distinct within each language (checked when writing)
        images       int32         how many images it is right for (0 only for a class without an image)
        name_en, name_zh  string   cub, dogs, cars only
    choice.parquet                     hard negatives (config "choice"); coco-mcc, coco-count, vg-pos, hoi-pos only
        image_id     string
        candidates_en, candidates_zh  list[string]   one is true of the image, each of the others differs in one thing
        label        int64         which one is true
        factor       string        what differs: category, count, roles, relation, verb
    README.md                          dataset card
    manifest.json                      "name", "rule", "seed", "counts" {images, texts, pairs, choices}, "paper"
        {images, texts, reproduced}, "dropped" {reason: n}, "sources" {role: {file, sha256}}, "tables" {file: sha256},
        "images" {files, sha256} or null, "captions_sha256" {en, zh} (every caption of every row in order, each followed
        by a newline, as UTF-8), "files" {file: sha256}

Positives are decided by text equality: all rows whose captions hold a text are right for it. The seven sets are scored
as retrieval over all rows and all texts (any-hit R@1/5/10 both ways, mean recall); cub, dogs and cars also as zero-shot
classification with `label`, `name_en`, `name_zh`; choice.parquet as accuracy, chance 1 / candidates.
"""
