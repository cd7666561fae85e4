"""The stages of a study, pretrain > tokens > train > features > score > report: the only place where lm, sae and features meet."""
