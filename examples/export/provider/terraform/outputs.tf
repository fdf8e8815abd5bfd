# WARNING: grown: 27 GPUs in place of the plan's 26, which would not keep the promise with a queue on each node; expected figures and thresholds are the plan's
# Made by: diffplan export plan.json --to all --cluster cluster.yaml --grow --out DIR
# Plan: 89acc3b24e8b9f4fd1ba13d6061e5a82a7bef01c6f3cabdd09d1355c9cc9de0c (scenario provider, diffplan 0.1.0)
# Profile: h200, id baf5f29d40c1
# Prices: 2026-11, 2026-11-22, 3.5 USD per GPU-hour (on_demand)
locals {
  n_gpus_of = {
    for name in keys(var.node_pools) : name => sum(concat([0], [for pool in var.worker_pools : pool.n_gpus if pool.node_pool == name]))
  }
}

output "node_pools" {
  description = "For for_each over your provider's node pool resource."
  value       = var.node_pools

  precondition {
    condition     = alltrue([for pool in var.worker_pools : contains(keys(var.node_pools), pool.node_pool)])
    error_message = "Every worker_pools[*].node_pool must be a key of node_pools."
  }

  precondition {
    condition     = alltrue([for name, pool in var.node_pools : local.n_gpus_of[name] == pool.n_gpus_used])
    error_message = "The GPUs of the worker pools must add up to n_gpus_used of their node pool."
  }
}

output "n_gpus" {
  description = "GPUs that the plan uses and prices."
  value       = sum([for pool in var.worker_pools : pool.n_gpus])
}

output "n_gpus_rented" {
  description = "GPUs of the nodes: whole nodes may have more than the plan uses."
  value       = sum([for pool in values(var.node_pools) : pool.n_nodes * pool.gpus_per_node])
}

output "plan" {
  description = "Where these numbers come from, for tags."
  value       = var.plan
}
