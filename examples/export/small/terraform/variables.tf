# Made by: diffplan export plan.json --to all --cluster cluster.yaml --out DIR
# Plan: 73783b075b2d602f27f19a3bd46e9a28cef9e3a5ea171ab159124b2f636ff856 (scenario small, diffplan 0.1.0)
# Profile: h200, id baf5f29d40c1
# Prices: 2026-11, 2026-11-22, 3.5 USD per GPU-hour (on_demand)
# What is needed, in the plan's words. No provider is named: a module of yours turns outputs.node_pools into machines.
# Checked offline: types, ranges, and that nodes hold what pools need. Not checkable offline: whether your provider has an
# instance type with these GPUs, quotas, zones, capacity of spot machines, today's prices.

variable "plan" {
  description = "Where these numbers come from."
  type = object({
    plan_id                = string
    scenario_name          = string
    profile_name           = string
    profile_id             = string
    price_table_id         = string
    price_date             = string
    price_usd_per_gpu_hour = number
    purchase               = string
    command                = string
    diffplan_version       = string
    warnings               = list(string)
  })

  validation {
    condition     = can(regex("^[0-9a-f]{64}$", var.plan.plan_id))
    error_message = "plan.plan_id must be the SHA-256 of a plan: 64 lower-case hexadecimal digits."
  }

  validation {
    condition     = var.plan.price_usd_per_gpu_hour > 0
    error_message = "plan.price_usd_per_gpu_hour must be above 0."
  }
}

variable "node_pools" {
  description = "Groups of equal nodes, by a name that is safe as a label."
  type = map(object({
    gpu_kind      = string
    purchase      = string
    gpus_per_node = number
    n_nodes       = number
    n_nodes_min   = number
    n_nodes_max   = number
    n_gpus_used   = number
    labels        = map(string)
    taint         = string
  }))

  validation {
    condition     = length(var.node_pools) > 0
    error_message = "node_pools must name at least one pool."
  }

  validation {
    condition     = alltrue([for name, pool in var.node_pools : can(regex("^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$", name))])
    error_message = "Every key of node_pools must be a DNS label of at most 63 characters."
  }

  validation {
    condition     = alltrue([for pool in values(var.node_pools) : contains(["on_demand", "spot"], pool.purchase)])
    error_message = "node_pools[*].purchase must be on_demand or spot."
  }

  validation {
    condition     = alltrue([for pool in values(var.node_pools) : length(pool.gpu_kind) > 0])
    error_message = "node_pools[*].gpu_kind must not be empty."
  }

  validation {
    condition = alltrue([
      for pool in values(var.node_pools) : pool.gpus_per_node >= 1 && floor(pool.gpus_per_node) == pool.gpus_per_node
    ])
    error_message = "node_pools[*].gpus_per_node must be a whole number, 1 or more."
  }

  validation {
    condition = alltrue([
      for pool in values(var.node_pools) : pool.n_nodes_min <= pool.n_nodes && pool.n_nodes <= pool.n_nodes_max && pool.n_nodes_min >= 0 && floor(pool.n_nodes) == pool.n_nodes
    ])
    error_message = "node_pools need whole numbers with 0 <= n_nodes_min <= n_nodes <= n_nodes_max."
  }

  validation {
    condition     = alltrue([for pool in values(var.node_pools) : pool.n_gpus_used <= pool.n_nodes * pool.gpus_per_node])
    error_message = "node_pools[*].n_gpus_used must fit n_nodes times gpus_per_node."
  }
}

variable "worker_pools" {
  description = "The plan's pools: which workers run on which nodes."
  type = list(object({
    name       = string
    role       = string
    gpu_kind   = string
    node_pool  = string
    n_replicas = number
    n_gpus     = number
  }))

  validation {
    condition     = alltrue([for pool in var.worker_pools : contains(["base", "controlnet"], pool.role)])
    error_message = "worker_pools[*].role must be base or controlnet."
  }

  validation {
    condition     = alltrue([for pool in var.worker_pools : pool.n_replicas >= 0 && pool.n_gpus >= 0])
    error_message = "worker_pools[*].n_replicas and n_gpus must be 0 or more."
  }
}
