"""From public sources to bilingual training shards: `python -m training.corpus STAGE --config FILE`; docs/corpus.md.

The frame: config, engine (tasks, kills, totals), workers and slurm (who runs them), rows (the one schema, and parts).
Each stage is the module of its name; beside it:

- sources: adapters (columns of the public sources), entries, reading, downloads
- clean: pictures and language (rules of a row), perceptual and duplicates, guard (evaluation images)
- score: scorer, score_histogram
- rewrite: rewriters, finetune_rewriter; translate: translators; both: chat (servers), journal, answers (checks)
- shards: shuffle, shard_task, shard_writers, manifest, card, publish, verify
- tokenizer
- plan: rates.yaml, table_12.yaml

pinned has the models used by default. example.yaml is a corpus like the paper's, laptop.yaml one that runs anywhere.
"""
