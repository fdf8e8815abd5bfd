"""Words of the page Export."""

WORDS = {
    "export.nav": ("Export", "書き出し"),
    "export.title": ("Take the plan away", "計画を持ち出す"),
    "export.lead": (
        "The plan as files for a cluster, for monitoring and for finance; each is checked and read back before you get it.",
        "計画をクラスター・監視・経理用のファイルにします。渡す前にすべて検査し、読み戻して確かめます。",
    ),
    "export.files": ("The plan itself", "計画そのもの"),
    "export.files.note": (
        "report.html works without a server and prints well; plan.json is what every other command reads.",
        "report.htmlはサーバーなしで開け、印刷もできます。plan.jsonはほかのコマンドが読む形式です。",
    ),
    "export.targets": ("What for", "書き出し先"),
    "export.targets.help": (
        "Kubernetes, autoscaling, Prometheus and Terraform files need to know the cluster; json and csv are the bill.",
        "kubernetes・autoscaling・prometheus・terraformにはクラスターの情報が必要です。jsonとcsvは請求の明細です。",
    ),
    "export.no_target": ("Choose at least one.", "少なくとも1つ選んでください。"),
    "export.no_cluster": (
        "Say which image runs and where models come from, or give a cluster file.",
        "イメージとモデルの取得元を入力するか、クラスターファイルを指定してください。",
    ),
    "export.phase": ("Which fleet", "どの構成を"),
    "export.phase.all": ("the recommendation", "推奨構成"),
    "export.phase.one": ("phase {n}: {name}", "段階{n}: {name}"),
    "export.phase.none": (
        "To export a phase of the introduction, simulate the phases on the page ROI first.",
        "導入の段階ごとに書き出すには、先に「投資効果」のページで段階をシミュレートしてください。",
    ),
    "export.cluster": ("The cluster", "クラスター"),
    "export.cluster.file": ("Cluster file (optional)", "クラスターファイル（任意）"),
    "export.cluster.file.help": (
        "YAML as examples/export/cluster.yaml, at most {n} kB. It takes the place of the fields below.",
        "examples/export/cluster.yamlと同じ形式のYAML、最大{n} kB。下の欄の代わりになります。",
    ),
    "export.image": ("Container image with diffplan's engine", "diffplanのエンジンを含むコンテナイメージ"),
    "export.store": ("Where models come from (URL)", "モデルの取得元（URL）"),
    "export.volume": ("… or a PersistentVolumeClaim", "…またはPersistentVolumeClaim"),
    "export.namespace": ("Namespace", "名前空間"),
    "export.per_node": ("GPUs of a node (GPUs)", "ノードのGPU数（台）"),
    "export.prometheus_url": ("Prometheus (URL, for autoscaling)", "Prometheus（URL、autoscaling用）"),
    "export.check_pods": ("Simulate the pods as exported", "書き出すPodの形でシミュレートする"),
    "export.check_pods.help": (
        "A plan over several nodes becomes several queues. This simulates what is exported and says whether the promise still holds. Takes longer.",
        "複数ノードの計画では待ち行列が分かれます。書き出す形でシミュレートし、目標を守れるか確かめます。時間がかかります。",
    ),
    "export.doubtful": (
        "This plan does not hold as it stands. Files made from it say so, every one of them:",
        "この計画はそのままでは成り立ちません。書き出すファイルすべてにその旨が入ります:",
    ),
    "export.confirm": ("I have read this and want the files all the same", "内容を確認した上で書き出す"),
    "export.make": ("Make the files", "ファイルを作る"),
    "export.must_confirm": ("Confirm first.", "先に確認してください。"),
    "export.archive": ("Download all ({n} files, zip)", "すべてダウンロード（{n}ファイル、zip）"),
    "export.look": ("Look into a file", "ファイルを見る"),
    "export.cut": (
        "Only the first {n} characters are shown.",
        "先頭の{n}文字だけを表示しています。",
    ),
    "export.notes": ("What you have to know", "知っておくこと"),
    "export.none": (
        "There is nothing to export: not even a nearest allocation is known.",
        "書き出せる構成がありません。",
    ),
    "export.old": (
        "The files below were made for other choices; make them again.",
        "下のファイルは変更前の選択で作ったものです。もう一度作ってください。",
    ),
}
