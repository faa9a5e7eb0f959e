"""From public sources to bilingual training shards: `python -m training.corpus STAGE --config FILE`; docs/corpus.md."""
