"""Words of the frame, of the side bar, and words that every page uses."""

WORDS = {
    "frame.in_words": ("In words", "文章で読む"),
    "frame.as_csv": ("CSV", "CSV"),
    "frame.cannot_be_planned": ("This question cannot be planned yet.", "この条件ではまだ計画できません。"),
    "frame.link_ignored": (
        "This link says something that cannot be used and was left out:",
        "リンクに使えない指定があったため、次のものを無視しました。",
    ),
    "frame.window": (
        ", of which hours {start} to {end} are planned for",
        "（このうち{start}〜{end}時間目を計画の対象とする）",
    ),
    "frame.busiest": (
        ", of which the busiest {length} h are planned for",
        "（このうち最も混む{length}時間を計画の対象とする）",
    ),
    "frame.question": (
        "About {n} requests over {hours} h ({rate} requests per second){cut}; {share} % of them promised within {latency} s; {model} on {gpu} at "
        "${price} per GPU-hour; {topologies} compete.",
        "約{n}件のリクエスト、{hours}時間（毎秒{rate}件）{cut}。目標は{share}%を{latency}秒以内。{gpu}上の{model}、GPU 1台1時間あたり${price}。"
        "比較する構成: {topologies}。",
    ),
    "frame.needs": ("needs {needs}", "必要な値: {needs}"),
    "frame.more_problems": ("… and {n} more problems of this input.", "…ほかに{n}件の問題があります。"),
    "frame.nothing_measured": (
        "Nothing in this profile was measured: every latency in it is assumed, and so is every result below.",
        "このプロファイルには実測値がありません。レイテンシはすべて仮定であり、以下の結果もすべて仮定に基づきます。",
    ),
    "grade.counts": ("Latency laws behind them: {counts}.", "根拠となるレイテンシ則: {counts}。"),
    "grade.count": ("{n} {grade}", "{grade}{n}"),
    "grade.measured": ("measured", "実測"),
    "grade.interpolated": ("interpolated", "内挿"),
    "grade.extrapolated": ("extrapolated", "外挿"),
    "grade.assumed": ("assumed", "仮定"),
    "grade.measured.help": ("At points that were measured.", "実測した点での値です。"),
    "grade.interpolated.help": ("Between points that were measured.", "実測した点のあいだの値です。"),
    "grade.extrapolated.help": ("Outside the range that was measured.", "実測した範囲の外の値です。"),
    "grade.assumed.help": (
        "At least one latency law behind it was not measured; the page Accuracy lists the sources.",
        "少なくとも一つのレイテンシ則が実測ではありません。出典は「精度」ページにあります。",
    ),
    "side.question": ("Question", "条件"),
    "side.scenario": ("Scenario", "シナリオ"),
    "side.scenario.help": (
        "The traffic, the promise and the limits of the search.",
        "トラフィック、目標、探索の範囲をまとめたものです。",
    ),
    "side.scenario_file": ("Scenario file", "シナリオファイル"),
    "side.scenario_file.help": ("YAML, at most {mib} MiB.", "YAML、最大{mib} MiB。"),
    "side.own_file": ("A file of my own…", "自分のファイル…"),
    "side.own_traffic": ("Traffic of my own (optional)", "自分のトラフィック（任意）"),
    "side.trace_file": ("Trace file", "トレースファイル"),
    "side.trace_file.help": (
        "At most {mib} MiB and {rows} requests. Kept until this page is closed.",
        "最大{mib} MiB、{rows}件。このページを閉じるまで保持します。",
    ),
    "side.profile": ("Profile", "プロファイル"),
    "side.profile.help": (
        "Measured latencies of an engine on a kind of GPU.",
        "ある種類のGPU上でエンジンのレイテンシを実測したものです。",
    ),
    "side.profile_file": ("Profile file", "プロファイルのファイル"),
    "side.profile_file.help": (
        "Written by 'diffplan calibrate fit'; at most {mib} MiB.",
        "'diffplan calibrate fit' が書き出すファイル。最大{mib} MiB。",
    ),
    "side.choose_scenario": (
        "Choose a scenario file in the sidebar, or one of the shipped scenarios.",
        "サイドバーでシナリオファイルを選ぶか、同梱のシナリオを選んでください。",
    ),
    "side.choose_profile": (
        "Choose a profile file (written by 'diffplan calibrate fit') in the sidebar, or start the dashboard with --profile FILE.",
        "サイドバーでプロファイル（'diffplan calibrate fit' の出力）を選ぶか、--profile FILE を付けて起動してください。",
    ),
    "side.no_profile": (
        "This installation ships no measured profile. ",
        "このインストールには実測プロファイルが同梱されていません。",
    ),
    "side.what_if": ("Traffic, promise, price", "トラフィック・目標・価格"),
    "side.factor": ("Traffic (times the trace)", "トラフィック（トレースの何倍か）"),
    "side.factor.help": (
        "Copies of the trace, shifted in time and put on top of each other.",
        "トレースの写しを時間をずらして重ねます。",
    ),
    "side.slo": ("Promised latency (s)", "目標レイテンシ（秒）"),
    "side.slo.help": ("From arrival to image, waiting included.", "到着から画像まで。待ち時間を含みます。"),
    "side.attainment": ("Requests within it (%)", "その時間内に返す割合（%）"),
    "side.attainment.help": (
        "Share of all offered requests; rejected ones count against it.",
        "到着した全リクエストに対する割合。拒否した分は未達と数えます。",
    ),
    "side.price": ("GPU price (USD per GPU-hour)", "GPU単価（USD／GPU・時間）"),
    "side.price.help": (
        "Starts at the price table's quote; your own contract's price goes here.",
        "初期値は価格表の値です。契約価格があれば入力してください。",
    ),
    "side.price.unknown": ("not known", "不明"),
    "side.price.quote": ("{purchase} quote for {gpu} of {date}", "{gpu}の{purchase}価格（{date}時点）"),
    "side.price.own": ("Your price", "入力された価格"),
    "side.price.listed": ("; the table's quote is ${price}", "（価格表では${price}）"),
    "side.link": ("The address of this page repeats these choices.", "このページのURLでこの条件を再現できます。"),
    "side.link.uploads": (
        "The address of this page repeats these choices, except for the uploaded files, which it cannot carry.",
        "このページのURLでこの条件を再現できます（アップロードしたファイルは含まれません）。",
    ),
}
