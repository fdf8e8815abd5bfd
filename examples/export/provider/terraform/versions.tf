# Made by: diffplan export plan.json --to all --cluster cluster.yaml --grow --out DIR
# Plan: 93b0305972617477bfd804cb6f74e523834ef104fdb6e28330057c985a8376b6 (scenario provider, diffplan 0.1.0)
# Profile: h200, id 1fe1630165f8
# Prices: 2026-11, 2026-11-22, 3.5 USD per GPU-hour (on_demand)
terraform {
  required_version = ">= 1.3"
}
