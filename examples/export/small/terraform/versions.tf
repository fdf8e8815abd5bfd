# Made by: diffplan export plan.json --to all --cluster cluster.yaml --out DIR
# Plan: 73783b075b2d602f27f19a3bd46e9a28cef9e3a5ea171ab159124b2f636ff856 (scenario small, diffplan 0.1.0)
# Profile: h200, id baf5f29d40c1
# Prices: 2026-11, 2026-11-22, 3.5 USD per GPU-hour (on_demand)
terraform {
  required_version = ">= 1.3"
}
