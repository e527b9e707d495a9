"""Celo2, a learned optimizer for pretraining: `Celo2`, the rules it runs, and the routing of a model's parameters to it."""

from celo2.distributed.shard import ShardingError
from celo2.optimizer import Celo2
from celo2.routing import param_groups, routing_table
from celo2.rule import Rule
from celo2.rule_files import RuleError, load_rule, save_rule

__all__ = ["Celo2", "Rule", "RuleError", "ShardingError", "load_rule", "param_groups", "routing_table", "save_rule"]
